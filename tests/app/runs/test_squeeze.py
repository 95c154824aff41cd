"""Squeezing on the way of the command line."""

from __future__ import annotations

import pytest

from shallower.app.compression import run_method
from shallower.app.runs.squeeze import SqueezeRun
from shallower.errors import FitError
from tests.app.small import work


def test_healing_is_told_and_counted() -> None:
    result = run_method(work("params:50%"), SqueezeRun(samples=96, heal=2))
    assert result.outcome.note == "healed"
    assert len(result.outcome.details["healing"]["losses"]) == 2
    assert result.outcome.details["calibrated"] == 96


def test_batchnorm_is_measured_again_where_that_helps() -> None:
    details = run_method(work("params:50%", normed=True), SqueezeRun(samples=96)).outcome.details
    assert details["batchnorm_recalibrated"] in (True, False)


def test_a_drop_target_keeps_the_score() -> None:
    result = run_method(work("drop:10%", dense_epochs=6), SqueezeRun(samples=96))
    assert result.verdict.small.params < result.verdict.dense.params


def test_numbers_cannot_be_rearranged_as_text() -> None:
    with pytest.raises(FitError, match="tokens"):
        run_method(work("params:50%"), SqueezeRun(samples=96, vary=True))
