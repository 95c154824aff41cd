"""The run that decides by the minutes it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shallower.app.compression import Work, run_method
from shallower.app.deciding.clock import Clock
from shallower.app.runs import auto
from shallower.app.runs.auto import AutoRun
from shallower.errors import TargetError
from shallower.training import Recipe, train
from tests.app.small import work


def trained(target: str) -> Work:
    """A network that knows its rows, and half a minute to make it smaller."""
    given = work(target)
    train(given.model, given.batches.train, given.task.loss, Recipe(12, 1e-2), cpu=True)
    given.model.eval()
    return replace(given, clock=Clock.begun(0.5))


def test_it_squeezes_and_heals_and_tells_it_in_a_paragraph() -> None:
    said: list[str] = []
    given = trained("params:30%")
    result = run_method(replace(given, tell=said.append), AutoRun(heal=3))
    assert result.verdict.small.params <= 0.3 * result.verdict.dense.params
    assert said[0].startswith("squeezing on 160 rows (about ")
    assert said[1].startswith("healing on 160 rows, at most ")
    assert result.outcome.note == "healed"
    assert "fitted anew on 160 rows" in result.summary
    assert "accuracy on 40 test rows is" in result.summary
    assert given.clock.left > 0


def test_healing_never_makes_it_worse_on_rows_held_out() -> None:
    healing = run_method(trained("params:30%"), AutoRun(heal=3)).outcome.details["healing"]
    assert max(healing["scores"], default=healing["before"]) >= healing["before"] or healing["stopped"]


def test_without_time_to_heal_the_outlook_says_so() -> None:
    result = run_method(trained("params:30%"), AutoRun(heal=0))
    assert result.outcome.note == "squeezed"
    assert "There was no time to heal" in result.summary


def test_collapsing_is_tried_with_time_left_and_taken_only_if_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_FEWEST_COLLAPSED", 10)
    given = trained("params:40%")
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    result = run_method(given, AutoRun(heal=0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())
    squeezed = run_method(replace(given, clock=Clock.begun(0.5)), AutoRun(heal=0, samples=96))
    if result.outcome.note == "squeezed":
        assert given.score(result.model) == pytest.approx(given.score(squeezed.model), abs=0.1)
    else:
        assert given.score(result.model) > given.score(squeezed.model) - 0.1
    assert "ollaps" in result.summary or given.score(result.model) >= given.score(given.model)


def test_a_target_out_of_reach_is_an_error() -> None:
    with pytest.raises(TargetError):
        run_method(trained("params:0.1%"), AutoRun())
