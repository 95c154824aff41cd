"""Scores as people say them."""

from __future__ import annotations

import pytest

from shallower.app.quality import difference, seconds, shown


@pytest.mark.parametrize(
    ("quality", "score", "text"),
    [("accuracy", 0.934, "93.40 %"), ("perplexity", -2.0, "7.389"), ("cosine", 0.9876, "0.9876")],
)
def test_scores_are_shown_as_people_say_them(quality: str, score: float, text: str) -> None:
    assert shown(quality, score) == text


def test_a_perplexity_out_of_range_is_still_a_number() -> None:
    assert "e+" in shown("perplexity", -1e9)


@pytest.mark.parametrize(
    ("quality", "before", "after", "text"),
    [
        ("accuracy", 0.9, 0.88, "-2.00 points"),
        ("perplexity", -1.5, -1.6, "+0.471"),
        ("cosine", 1.0, 0.98, "-0.0200"),
    ],
)
def test_a_change_is_told_on_the_scale_that_is_read(quality: str, before: float, after: float, text: str) -> None:
    assert difference(quality, before, after) == text


@pytest.mark.parametrize(("value", "text"), [(0.00052, "0.52 ms"), (0.0125, "12.5 ms"), (1.24, "1.24 s")])
def test_times_have_a_unit_that_fits(value: float, text: str) -> None:
    assert seconds(value) == text
