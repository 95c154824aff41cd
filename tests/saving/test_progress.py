"""Results of a long computation in a file: they come back as they were, and only for the same computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shallower.errors import CheckpointError
from shallower.planning.entries import Entry, Fit
from shallower.saving.progress import Progress, digest
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


def test_entries_and_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    first = Progress(tmp_path / "p.safetensors", {"weights": "a"})
    assert first.entries("x") == []
    made = entry()
    first.keep("x", [made])
    first.keep_value("errors", {"mlp": {1: 0.1, 2: 1 / 3}})
    again = Progress(tmp_path / "p.safetensors", {"weights": "a"})
    (read,) = again.entries("x")
    assert read.fit is not None
    assert made.fit is not None
    assert torch.equal(read.fit.consumers[0], made.fit.consumers[0])
    assert torch.equal(read.fates, made.fates)
    assert again.value("errors") == {"mlp": {1: 0.1, 2: 1 / 3}}
    assert again.value("other") is None


def test_the_file_of_another_computation_is_refused(tmp_path: Path) -> None:
    Progress(tmp_path / "p.safetensors", {"weights": "a", "data": "b"}).keep("x", [entry()])
    with pytest.raises(CheckpointError, match=r"another computation \(weights differ\)"):
        Progress(tmp_path / "p.safetensors", {"weights": "c", "data": "b"})


def test_a_damaged_file_is_an_error_that_tells_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    Progress(path, {}).keep("x", [entry()])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete it"):
        Progress(path, {})


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Progress(tmp_path / "file" / "p.safetensors", {}).keep("x", [entry()])


def test_other_batches_have_another_digest() -> None:
    x = [torch.ones(2, 3), torch.zeros(2, 3)]
    assert digest(x) == digest([t.clone() for t in x])
    assert len({digest(x), digest(x[:1]), digest([x[1], x[0]]), digest([{"a": t.int()} for t in x])}) == 4
