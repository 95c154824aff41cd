"""TLC on the way of the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shallower.app.compression import preview, run_method
from shallower.app.runs.till_layers_collapse import TillLayersCollapseRun
from shallower.core.codec import encode
from shallower.errors import CheckpointError, TargetError
from shallower.training import Recipe, train
from tests.app.small import work


def test_activations_go_and_every_round_is_a_point(tmp_path: Path) -> None:
    result = run_method(work("params:50%", epochs=3, folder=tmp_path), TillLayersCollapseRun("entropy"))
    removed = result.outcome.details["removed"]
    assert [point.removed for point in result.outcome.points] == list(range(1, len(removed) + 1))
    assert json.loads((tmp_path / "points.json").read_text()) == encode(result.outcome.points)


def test_a_preview_removes_what_would_go_now() -> None:
    plan, before, after = preview(work("params:50%"), TillLayersCollapseRun("random"))
    assert len(plan) > 0
    assert after.params <= 0.5 * before.params


def test_damaged_points_of_an_interrupted_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text("[{")
    with pytest.raises(CheckpointError, match=r"points\.json"):
        run_method(work("params:50%", folder=tmp_path), TillLayersCollapseRun("entropy"))


def test_where_nothing_can_go_the_first_one_is_named() -> None:
    given = work("drop:0.0001%")
    train(given.model, given.batches.train, given.task.loss, Recipe(6, 1e-2), cpu=True)
    given = replace(given, recipe=Recipe(1, 1e-9))
    with pytest.raises(TargetError, match="no activation could go"):
        run_method(given, TillLayersCollapseRun("entropy", per_round=2))
