"""The paragraph about a result."""

from __future__ import annotations

import math

import pytest

from shallower.app.deciding.telling import cost_sentence, outlook, still_falling
from shallower.app.results import Measured, Verdict
from shallower.training import History


def verdict(speedup: float, spread: float = 0.01) -> Verdict:
    dense, small = Measured(0.9, 1000, 10_000, 4000, 0.2), Measured(0.88, 600, 5000, 2400, 0.1)
    return Verdict(dense, small, speedup, spread)


def test_a_result_is_said_with_what_it_costs() -> None:
    said = cost_sentence(verdict(2.0, 0.02), "accuracy", "40 test rows")
    assert said == (
        "The result has 60% of the parameters and 50% of the MACs, and is 2.00 ± 0.04 times as fast; accuracy on 40 "
        "test rows is 88.00 %, was 90.00 % (-2.00 points)."
    )


@pytest.mark.parametrize(
    ("speedup", "spread", "said"),
    [(1.01, 0.5, "not faster beyond the noise"), (0.9, 0.01, "no faster"), (math.nan, 0.0, "of the MACs;")],
)
def test_a_speed_that_is_none_is_said(speedup: float, spread: float, said: str) -> None:
    assert said in cost_sentence(verdict(speedup, spread), "cosine", "40 rows")


def test_what_more_time_would_bring_follows_from_the_last_rounds() -> None:
    assert still_falling([-1.0, -0.5, -0.4]) == pytest.approx(0.2)
    assert still_falling([-0.5, -0.4999]) == 0
    assert still_falling([]) == still_falling([math.nan, -1.0]) == 0
    assert "no time to heal" in outlook(None, 120)
    assert "still falling, by 20%" in outlook(History(scores=[-0.5, -0.4], before=-1.0), 120)
    assert "hardly fell" in outlook(History(scores=[-0.5, -0.4999], before=-1.0), 120)
    assert "gained no more" in outlook(History(scores=[-0.5], before=-1.0, stopped=True), 120)
