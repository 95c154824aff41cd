"""`sh.compress` on models and batches that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.app.results import read_record
from tests.app.small import network


def pairs(count: int = 12) -> list[Any]:
    """Rows whose class is the largest of their first three numbers."""
    x = torch.randn(count, 16, 8, generator=torch.Generator().manual_seed(0))
    return [(rows, rows[:, :3].argmax(1)) for rows in x]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_smaller_model_comes_back_and_the_first_stays(tmp_path: Path) -> None:
    model, said = network(), list[str]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = sh.compress(model, pairs(), "params:50%", minutes=0.3, tell=said.append)
    assert params(small) <= 0.5 * params(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "accuracy on" in said[-1]
    sh.save(small, tmp_path / "out")
    assert params(sh.load(tmp_path / "out", model=network())) == params(small)


def test_without_labels_it_is_judged_by_its_likeness() -> None:
    said: list[str] = []
    sh.compress(network(), [x for x, _ in pairs()], "params:50%", minutes=0.3, tell=said.append)
    assert "cosine with the original" in said[-1]


def test_a_score_of_ones_own_is_what_counts() -> None:
    def score(model: nn.Module) -> float:
        x = pairs()[0][0]
        return -float((model(x) - reference(x)).norm())

    said: list[str] = []
    reference = network()
    sh.compress(reference, pairs(), "params:60%", minutes=0.3, score=score, tell=said.append)
    assert "score on" in said[-1]


def test_a_folder_gets_what_the_command_writes(tmp_path: Path) -> None:
    small = sh.compress(network(), pairs(), "params:50%", minutes=0.3, output=tmp_path / "out", tell=lambda _: None)
    record = read_record(tmp_path / "out")
    assert record.small.params == params(small)
    assert record.summary
    assert (tmp_path / "out" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("batches", "more", "error", "message"),
    [
        ([], {}, sh.DataError, "one row, or none"),
        ([torch.randn(1, 8)], {}, sh.DataError, "one row, or none"),
        (torch.randn(4, 8), {}, sh.DataError, r"pass \[batch\]"),
        (iter([torch.randn(4, 8)]), {}, sh.SiteError, "one-shot iterator"),
        (pairs(), {"minutes": 0}, sh.MethodError, "more than 0"),
        (pairs(), {"target": "weight:1%"}, sh.TargetError, "UNIT:AMOUNT"),
        (pairs(), {"target": "params:0.01%"}, sh.TargetError, "would remain"),
    ],
)
def test_what_cannot_be_done_is_said(batches: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"target": "params:50%", "minutes": 0.3, "tell": lambda _: None, **more}
    with pytest.raises(error, match=message):
        sh.compress(network(), batches, **given)


def test_a_few_large_batches_are_cut_so_that_some_can_be_held_out() -> None:
    x = torch.randn(320, 8)
    small = sh.compress(network(), [x], "params:50%", minutes=0.3, tell=lambda _: None)
    assert params(small) < params(network())
