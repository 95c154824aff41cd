"""What several processes agree on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shallower.core.processes import (
    added,
    agreed,
    all_agree,
    barrier,
    from_first_process,
    gathered,
    is_first,
    raised_anywhere,
    several,
    summed,
    summed_over_processes,
)
from shallower.errors import TargetError
from tests.processes import in_two_processes

WRITING = """
import sys
from torch import distributed
from shallower.errors import CheckpointError
from shallower.methods.squeezing.progress import Progress

distributed.init_process_group("gloo")
progress = Progress(sys.argv[1] + "/progress", {})
open(sys.argv[1] + "/progress", "a").close()
distributed.barrier()
try:
    progress.keep_curves({})
except CheckpointError as error:
    assert "cannot be written" in str(error)
else:
    raise AssertionError
"""

WORKER = """
import sys
import torch
from torch import distributed
from shallower.errors import TargetError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.squeeze import squeeze
from shallower.core.processes import from_first_process, summed_over_processes
from tests.methods.squeezing.test_latencies import Blocks

distributed.init_process_group("gloo")
rank = distributed.get_rank()
assert from_first_process(lambda: rank + 5) == 5
assert summed_over_processes(1.0, rank) == (2.0, 1.0)
try:
    from_first_process(lambda: (_ for _ in ()).throw(TargetError(f"from {rank}")))
except TargetError as error:
    assert str(error) == "from 0"
else:
    raise AssertionError
torch.manual_seed(0)
model = Blocks(32, 1024)  # so wide that its hidden layers take the time, not PyTorch's calls
x = torch.randn(8, 256, 32)
sites = find_sites(model, x[0])
plan = squeeze(model, sites, list(x[rank::2]), sys.argv[2], checkpoint=sys.argv[1] + "/progress")
plan.save(f"{sys.argv[1]}/{rank}")
"""


SUMS = """
import torch
from torch import distributed
from shallower.core.processes import added, agreed, all_agree, gathered, raised_anywhere, summed
from shallower.errors import DataError, FitError, ShallowerError

distributed.init_process_group("gloo")
rank = distributed.get_rank()
counts = torch.tensor([1.0 if rank else 16_777_216.0])
assert summed(counts).tolist() == [16_777_217.0]
assert counts.tolist() == [1.0 if rank else 16_777_216.0]
assert summed(torch.tensor([[rank + 1]], dtype=torch.int8)).dtype == torch.int64
transposed = torch.arange(6.0, dtype=torch.float64).view(2, 3).t()
assert torch.equal(summed(transposed), 2 * transposed)
assert gathered("ab"[rank]) == ["a", "b"]
assert added("ab"[rank]) == "ab"
assert added(torch.ones(2) if rank else None).tolist() == [1, 1]
assert added(None) is None
assert agreed(rank) == 0
assert all_agree(3) and not all_agree(rank)
for kind, error, text in (
    (DataError, DataError("bad row"), "bad row"),
    (ShallowerError, KeyError("x"), "another process failed: KeyError: 'x'"),
):
    try:
        with raised_anywhere():
            if rank == 1:
                raise error
    except Exception as raised:
        assert raised is error if rank == 1 else (type(raised) is kind and str(raised) == text), raised
    else:
        raise AssertionError
with raised_anywhere():
    pass


def sums(failing, depth):
    # rank 1 fails at that depth
    with raised_anywhere():
        total = summed(counts)
        if rank == 1 and depth == 1:
            raise failing
        for _ in range(2):
            with raised_anywhere():
                gathered(rank)
                if rank == 1 and depth == 2:
                    raise failing
            agreed(rank)
        return total


assert sums(None, 0).tolist() == [16_777_217.0]
for depth in (1, 2):
    for attempt in range(2):  # the processes are together again afterwards
        try:
            sums(DataError("bad row"), depth)
        except DataError as error:
            assert str(error) == "bad row"
        else:
            raise AssertionError
        assert gathered(rank) == [0, 1]

# one goes on from an error of both, and the other does not
try:
    with raised_anywhere():
        try:
            with raised_anywhere():
                if rank == 1:
                    raise DataError("first")
        except DataError as error:
            if rank == 1:
                raise FitError("second") from error
        summed(counts)
except FitError as error:
    assert str(error) == "second"
else:
    raise AssertionError
assert gathered(rank) == [0, 1]
"""


@pytest.mark.slow
def test_two_processes_add_up_and_fail_together(tmp_path: Path) -> None:
    in_two_processes(SUMS, tmp_path)


@pytest.mark.slow
def test_what_the_first_process_cannot_write_is_an_error_of_both(tmp_path: Path) -> None:
    in_two_processes(WRITING, tmp_path, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_one_process_sums_in_wide_types(dtype: torch.dtype) -> None:
    tensor = torch.ones(3).to(dtype)
    assert summed(tensor).dtype == (torch.float64 if dtype.is_floating_point else torch.int64)
    assert summed(tensor).tolist() == [1, 1, 1]


def test_one_process_is_the_first_and_agrees_with_itself() -> None:
    assert is_first()
    assert not several()
    assert from_first_process(lambda: 3) == agreed(3) == 3
    assert gathered(3) == [3]
    assert all_agree(3)
    barrier()
    with pytest.raises(KeyError), raised_anywhere():
        raise KeyError
    assert summed_over_processes(1.5, 2) == (1.5, 2)
    assert added(3) == 3
    with pytest.raises(TargetError):
        from_first_process(lambda: (_ for _ in ()).throw(TargetError("no")))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["params:60%", "latency:70%"])
def test_two_processes_with_different_batches_make_the_same_plan(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    in_two_processes(WORKER, tmp_path, tmp_path, target)
    first, second = ((tmp_path / str(rank) / "plan.json").read_text() for rank in (0, 1))
    assert first == second
