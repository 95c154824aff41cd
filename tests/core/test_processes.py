"""What several processes agree on."""

from __future__ import annotations

from pathlib import Path

import pytest

from shallower.core.processes import from_first_process, is_first, several, summed_over_processes
from shallower.errors import TargetError
from tests.processes import in_two_processes

WORKER = """
import sys
import torch
from torch import distributed
from shallower.errors import TargetError
from shallower.finding.matching import find_sites
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
model = Blocks(16, 128)
x = torch.randn(8, 64, 16)
sites = find_sites(model, x[0])
plan = squeeze(model, sites, list(x[rank::2]), sys.argv[2], checkpoint=sys.argv[1] + "/progress.safetensors")
plan.save(f"{sys.argv[1]}/{rank}")
"""


def test_one_process_is_the_first_and_agrees_with_itself() -> None:
    assert is_first()
    assert not several()
    assert from_first_process(lambda: 3) == 3
    assert summed_over_processes(1.5, 2) == (1.5, 2)
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
