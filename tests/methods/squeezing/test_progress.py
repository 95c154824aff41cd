"""What a squeezing has found so far: it comes back as it was, and only for the same computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import CheckpointError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.progress import Progress, differences, identity_of
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.sites import LinearMap, Place, Site

SITE = Site(
    "mlp",
    "feed-forward",
    6,
    LinearMap("up", "linear", 4, 6, True, 10),
    (LinearMap("down", "linear", 6, 4, True, 10),),
    Place("act"),
)


def entry() -> Entry:
    fit = Fit((torch.randn(4, 2, dtype=torch.float64),), (torch.randn(4, dtype=torch.float64),))
    return Entry.narrow(SITE, torch.tensor([1, 3]), fit=fit)


def written(folder: Path) -> dict[str, int]:
    """Every file, and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_entries_and_curves_come_back_to_the_last_bit(tmp_path: Path) -> None:
    first = Progress(tmp_path / "p", {"weights": "a"})
    assert first.entries("x") == []
    assert first.curves() is None
    made = [entry(), entry()]
    for i, each in enumerate(made):
        first.keep("x", i, each)
    first.keep_curves({"mlp": {1: 0.1, 2: 1 / 3}})
    again = Progress(tmp_path / "p", {"weights": "a"})
    for one, other in zip(again.entries("x"), made, strict=True):
        assert one.fit is not None
        assert other.fit is not None
        assert torch.equal(one.fit.consumers[0], other.fit.consumers[0])
        assert torch.equal(one.fates, other.fates)
    assert again.curves() == {"mlp": {1: 0.1, 2: 1 / 3}}
    assert again.entries("y") == []


def test_what_is_written_once_is_not_written_again(tmp_path: Path) -> None:
    progress = Progress(tmp_path, {})
    progress.keep("x", 0, entry())
    before = written(tmp_path)
    progress.keep("x", 1, entry())
    assert before.items() <= written(tmp_path).items()


def test_the_checkpoint_of_another_computation_is_refused(tmp_path: Path) -> None:
    Progress(tmp_path / "p", {"weights": "a", "options": {"seed": 0, "producers": True}}).keep("x", 0, entry())
    with pytest.raises(CheckpointError, match=r"another computation \(seed, weights differ\)"):
        Progress(tmp_path / "p", {"weights": "c", "options": {"seed": 1, "producers": True}})


@pytest.mark.parametrize("name", ["identity.json", "curves.json", "plan.json", "plan.safetensors"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, name: str) -> None:
    progress = Progress(tmp_path, {})
    progress.keep("x", 0, entry())
    progress.keep_curves({"mlp": {1: 0.1}})
    path = next(tmp_path.rglob(name))
    path.write_bytes(path.read_bytes()[:-3])

    def read() -> None:
        again = Progress(tmp_path, {})
        again.entries("x")
        again.curves()

    with pytest.raises(CheckpointError, match="delete it"):
        read()


def test_what_a_killed_run_left_unfinished_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".identity.json.partial-1-01234567").write_text("{")
    progress = Progress(tmp_path, {})
    progress.keep("x", 0, entry())
    left = tmp_path / f".{next(tmp_path.glob('*-0000')).name}.partial-1-01234567"
    left.mkdir()
    assert len(Progress(tmp_path, {}).entries("x")) == 1


@pytest.mark.parametrize("place", ["file", "file/p", "a" * 5000, "nul\0"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        Progress(tmp_path / place, {}).keep("x", 0, entry())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="something else"):
        Progress(tmp_path, {})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()


def identity(change: Callable[[nn.Sequential], Any] = lambda _: None, **options: Any) -> dict[str, Any]:
    model = network()
    with torch.no_grad():
        change(model)
    chosen = replace(SqueezeOptions(), **options)
    return identity_of(model, find_sites(model, torch.zeros(2, 3)), "abc", chosen)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda m: m[3].bias.add_(1), ["weights"]),
        (lambda m: m[1].running_mean.add_(1), ["weights"]),
        (lambda m: setattr(m[1], "eps", 1e-3), ["modules"]),
    ],
    ids=["a bias", "a buffer", "a setting"],
)
def test_every_weight_and_setting_of_the_model_counts(change: Callable[[Any], Any], differing: list[str]) -> None:
    assert differences(identity(), identity()) == []
    assert differences(identity(), identity(change)) == differing


OFFSET = 1


def reads_a_global(output: Tensor) -> Tensor:
    return output + OFFSET


class Reader:
    """A callable with a setting."""

    def __init__(self, part: int) -> None:
        self.part = part

    def __call__(self, output: Tensor) -> Tensor:
        return output[self.part]


def test_functions_are_told_apart_by_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def taking(part: int) -> Callable[[Any], Any]:
        return lambda output: output[part]

    def partly(output: Any, part: int) -> Any:
        return output[part]

    same = (taking(1), taking(1)), (Reader(1), Reader(1)), (partial(partly, part=1), partial(partly, part=1))
    other = (taking(1), taking(2)), (Reader(1), Reader(2)), (partial(partly, part=1), partial(partly, part=2))
    for one, two in same:
        assert differences(identity(output_of=one), identity(output_of=two)) == []
    for one, two in other:
        assert differences(identity(output_of=one), identity(output_of=two)) == ["output_of"]
    before = identity(mask_of=reads_a_global)
    monkeypatch.setattr(f"{__name__}.OFFSET", 2)
    assert differences(before, identity(mask_of=reads_a_global)) == ["mask_of"]
