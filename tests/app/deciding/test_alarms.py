"""When a result is far below the original."""

from __future__ import annotations

import math

import pytest

from shallower.app.deciding.alarms import alarm_of, dense_alarm_of


@pytest.mark.parametrize(
    ("quality", "dense", "small", "chance", "said"),
    [
        ("accuracy", 0.9, 0.5, 0.5, "no better than chance (50.00 %)"),
        ("accuracy", 0.9, 0.75, 0.5, "more than a third of what the original has above chance (50.00 %) is lost"),
        ("cosine", 1.0, 0.6, 0.0, "more than a third of what the original has is lost"),
        ("perplexity", -math.log(4), -math.log(9), 0.0, "rose from 4 to 9, more than 2 times"),
        ("accuracy", 0.9, math.nan, 0.5, "not a number"),
    ],
)
def test_a_result_far_below_the_original_is_named(
    quality: str, dense: float, small: float, chance: float, said: str
) -> None:
    assert said in alarm_of(quality, dense, small, chance)


@pytest.mark.parametrize(
    ("quality", "dense", "small", "chance"),
    [
        ("accuracy", 0.9, 0.8, 0.5),
        ("accuracy", 0.5, 0.4, 0.5),
        ("perplexity", -math.log(4), -math.log(7.9), 0.0),
        ("agreement", 1.0, 0.9, 0.5),
    ],
)
def test_a_small_loss_is_no_alarm(quality: str, dense: float, small: float, chance: float) -> None:
    assert alarm_of(quality, dense, small, chance) == ""


def test_an_original_that_knows_nothing_of_the_rows_is_said() -> None:
    assert "do the labels number the classes" in dense_alarm_of("accuracy", 0.51, 0.5)
    assert dense_alarm_of("accuracy", 0.6, 0.5) == ""
    assert dense_alarm_of("cosine", 0.0, 0.0) == ""
