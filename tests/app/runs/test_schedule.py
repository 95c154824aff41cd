"""How the time of a run is divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shallower.app.compression import Work
from shallower.app.deciding.clock import Clock
from shallower.app.runs.schedule import Schedule
from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from tests.app.small import work


def schedule(given: Work, minutes: float = 1.0) -> Schedule:
    return Schedule(replace(given, clock=Clock.begun(minutes)), find_sites(given.model, given.batches.example))


def test_a_small_model_gets_all_the_rows_that_it_may_have() -> None:
    found = schedule(work("params:50%"))
    assert found.samples(96) == 96
    seconds, rows, passes = found.healing(8)
    assert (rows, passes) == (160, 8)
    assert 0 < seconds <= 60
    assert found.healing(0) == (0.0, 0, 0)
    assert "squeezing on 96 rows (about" in found.words(96)


def test_more_minutes_leave_more_for_healing() -> None:
    short, long = schedule(work("params:50%"), 1.0), schedule(work("params:50%"), 10.0)
    assert long.healing(8)[0] > short.healing(8)[0] + 500


def test_too_little_time_is_said_with_what_is_needed() -> None:
    with pytest.raises(MethodError, match=r"are too few: .* Give .* minutes or more \(--minutes\)"):
        schedule(work("params:50%"), 1e-3).samples(96)


def test_what_was_decided_holds_when_a_run_goes_on(tmp_path: Path) -> None:
    given = work("params:50%", folder=tmp_path)
    first = schedule(given).healing(8)
    assert schedule(given, 9.0).healing(8) == first
