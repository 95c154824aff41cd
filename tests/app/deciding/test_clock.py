"""What the minutes allow, and what was decided by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shallower.app.deciding.clock import Clock, Decisions, RowPace, algebra_seconds, measured_pace, spoken
from shallower.errors import CheckpointError


def test_time_runs_out_and_stays_at_nothing() -> None:
    clock = Clock.begun(1.0)
    assert 0 < clock.left <= 60
    assert clock.spent >= 0
    assert Clock(1.0, clock.started - 5).left == 0


def test_the_pace_is_of_one_row() -> None:
    batches = [torch.randn(16, 8) for _ in range(3)]
    pace = measured_pace(nn.Linear(8, 8), batches)
    assert 0 < pace.forward < 1
    assert RowPace(1.0, 0.5).of_rows(4, 2) == 8


def test_wider_sites_take_longer() -> None:
    assert algebra_seconds([4096, 4096]) > algebra_seconds([64])


def test_a_decision_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    assert Decisions(path).number("rows", lambda: 64.0) == 64
    again = Decisions(path)
    assert again.number("rows", lambda: 32.0) == 64
    assert again.number("others", lambda: 1.0) == 1
    assert Decisions().number("rows", lambda: 8.0) == 8


def test_damaged_decisions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    for text in ("{", "[1]", '{"rows": "many"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"decisions\.json"):
            Decisions(path)


def test_times_are_said_as_people_say_them() -> None:
    assert list(map(spoken, (0.2, 8.4, 150, 3 * 3600))) == ["1 s", "8 s", "2.5 min", "3 h"]
