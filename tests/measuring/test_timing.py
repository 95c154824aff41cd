"""Ratios of times say which model is faster only where the noise allows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shallower.errors import ForwardError, ShallowerError
from shallower.measuring.timing import Ratio, times_in_turn

seconds = st.lists(st.floats(1e-6, 10), min_size=1, max_size=50)


@given(seconds)
def test_the_interval_holds_the_median(times: list[float]) -> None:
    ratio = Ratio.of(times, [1.0] * len(times))
    assert ratio.low <= ratio.median <= ratio.high
    assert min(times) <= ratio.low
    assert ratio.high <= max(times)


@given(seconds)
def test_a_time_is_neither_faster_nor_slower_than_itself(times: list[float]) -> None:
    ratio = Ratio.of(times, times)
    assert not ratio.is_faster
    assert not ratio.is_slower


@pytest.mark.parametrize(("count", "outside"), [(1, 0), (5, 0), (6, 0), (9, 1), (12, 2), (40, 13)])
def test_the_interval_is_that_of_the_sign_test(count: int, outside: int) -> None:
    ratio = Ratio.of([float(i) for i in range(1, count + 1)], [1.0] * count)
    assert (ratio.low, ratio.high) == (1 + outside, count - outside)


def test_one_block_out_of_line_does_not_decide() -> None:
    usual = [0.99, 1.01] * 6
    assert not Ratio.of([*usual, 0.1], [1.0] * 13).is_faster
    assert not Ratio.of([*usual, 9.0], [1.0] * 13).is_slower


def test_half_of_the_time_is_faster_and_twice_is_slower() -> None:
    assert Ratio.of([0.5, 0.6, 0.4], [1.0] * 3).is_faster
    assert Ratio.of([1.5, 2.6, 1.4], [1.0] * 3).is_slower
    assert str(Ratio.of([0.5, 0.6, 0.4], [1.0] * 3)) == "0.50 (0.40-0.60)"


@pytest.mark.parametrize("copies", [False, True])
def test_more_work_takes_more_time(copies: bool) -> None:
    models = {"small": nn.Linear(512, 512), "large": nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])}
    times = times_in_turn(models, torch.randn(64, 512), blocks=6, copies=copies)
    assert [len(own) for own in times.values()] == [6, 6]
    assert Ratio.of(times["small"], times["large"]).is_faster


def test_times_that_do_not_pair_are_errors() -> None:
    with pytest.raises(ShallowerError, match="2 and 1 times"):
        Ratio.of([1.0, 2.0], [1.0])
    with pytest.raises(ShallowerError, match="at least one"):
        Ratio.of([], [])


@pytest.mark.parametrize(("blocks", "passes"), [(0, 1), (1, 0)])
def test_nothing_to_time_is_an_error(blocks: int, passes: int) -> None:
    with pytest.raises(ShallowerError, match="at least one model"):
        times_in_turn({"one": nn.Identity()}, torch.zeros(1), blocks=blocks, passes=passes)
    with pytest.raises(ShallowerError, match="at least one model"):
        times_in_turn({}, torch.zeros(1))


def test_an_error_of_a_later_pass_is_one_sentence_and_models_are_as_they_were() -> None:
    class Tires(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.tensor(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            if self.passes > 3:
                raise ValueError("tired")
            return x

    model = Tires()
    with pytest.raises(ForwardError, match=r"small does not run on these inputs any more: ValueError: tired"):
        times_in_turn({"small": model}, torch.ones(1))
    assert int(model.passes) == 0
