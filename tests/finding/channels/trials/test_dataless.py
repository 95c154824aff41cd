"""Functions without data are computed once for each use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shallower.finding.channels.trials.dataless import Results


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Counting:
    """A function, and how often it ran."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.matmul, (blank(2, 3), blank(3, 4)), {}),
        (Tensor.transpose, (blank(2, 3), 0, 1), {}),
        (torch.cat, ([blank(2, 3), blank(2, 5)],), {"dim": 1}),
        (Tensor.max, (blank(2, 3),), {"dim": 1}),
        (Tensor.__getitem__, (blank(4, 3), (slice(1, 3), None)), {}),
        (torch.split, (blank(4, 3), 2), {}),
    ],
)
def test_the_second_time_gives_the_same_without_running(function: Any, args: Any, kwargs: Any) -> None:
    results, counted = Results(), Counting(function)
    first, second = (results.of(counted, args, kwargs) for _ in range(2))
    assert counted.count == 1
    assert type(first) is type(second)
    parts = [(first, second)] if isinstance(first, Tensor) else list(zip(first, second, strict=True))
    for one, two in parts:
        assert (one.shape, one.stride(), one.dtype, two.is_meta) == (two.shape, two.stride(), two.dtype, True)
        assert one is not two


def test_other_sizes_types_and_numbers_are_other_uses() -> None:
    results, counted = Results(), Counting(lambda x, n: x.repeat(int(n), 1))
    for args in ((blank(2, 3), 2), (blank(2, 4), 2), (blank(2, 3), 3), (blank(2, 3, dtype=torch.int64), 2)):
        results.of(counted, args, {})
    assert counted.count == 4


def test_what_is_written_into_is_handed_on() -> None:
    results, counted = Results(), Counting(Tensor.relu_)
    for _ in range(2):
        x = blank(2, 3)
        assert results.of(counted, (x,), {}) is x
    assert counted.count == 1


def test_indices_with_numbers_are_looked_at_every_time() -> None:
    results, counted = Results(), Counting(Tensor.__getitem__)
    for mask, rows in ((torch.tensor([True, False]), 1), (torch.tensor([True, True]), 2)):
        assert results.of(counted, (blank(2, 3), mask), {}).shape == (rows, 3)
    assert counted.count == 2


def test_functions_within_vmap_run_every_time() -> None:
    results = Results()
    for _ in range(2):
        assert torch.vmap(lambda row: results.of(torch.relu, (row,), {}))(blank(5, 4)).shape == (5, 4)
