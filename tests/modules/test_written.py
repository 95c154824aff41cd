"""Calls are found where they are written, and take other numbers there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import Refusal, SiteError
from shallower.modules.edits import Externalise, Number, edits, encoded, perform, replay
from shallower.modules.written import Waypoint, leaves, path_along, way_to, with_leaves
from shallower.recording.tracing import Frame, Trace, trace_forward
from shallower.sites import Written


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) * 1.0

    return run


def folded(x: Tensor, size: int) -> Tensor:
    return x.reshape(x.shape[0], -1, size)


class Everything(nn.Module):
    """Calls in helpers, methods, comprehensions, behind a decorator, in slices, assignments and operators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def folded(self, x: Tensor) -> Tensor:
        return folded(x, 4)

    @scaled
    def forward(self, x: Tensor, half: int = 6) -> Tensor:
        x = self.linear(x)
        first = x[:, :half].reshape(len(x), 2, 3)
        again = x[:, :half].reshape(len(x), 2, 3)
        both = sum(part.reshape(len(x), 6) for part in (first, again))
        y = torch.zeros(len(x), 12, dtype=x.dtype)
        y[:, 2:8] = both
        y *= 5
        return self.folded(x) + partial(folded, size=4)(y / 2)


def ways(model: nn.Module, x: Tensor) -> list[tuple[str, tuple[Waypoint, ...]]]:
    found = []

    def lead(trace: Trace, frame: Frame, function: Any, args: Any, kwargs: Any) -> Any:
        del trace
        outside: Any = sys._getframe()
        while outside.f_code.co_name != "__torch_function__":
            outside = outside.f_back
        found.append((function.__name__, way_to(outside.f_back, frame.module)))
        return function(*args, **kwargs)

    trace_forward(model, x, lead)
    return found


def paths(model: nn.Module, x: Tensor) -> list[tuple[str, str, int]]:
    found = []
    for name, way in ways(model, x):
        if not way or name == "__get__":  # no calls that the forward writes
            continue
        path = path_along(way)
        assert not isinstance(path, Refusal), (name, path)
        found.append((name, *path[0][-1]))
    return found


def test_the_text_and_the_number_of_each_call_are_found() -> None:
    found = paths(Everything(), torch.randn(3, 12))
    assert ("reshape", "x[:, :half].reshape(len(x), 2, 3)", 1) in found
    assert ("__getitem__", "x[:, :half]", 0) in found
    assert ("__setitem__", "y[:, 2:8]", 0) in found
    assert found.count(("reshape", "part.reshape(len(x), 6)", 0)) == 2
    assert ("reshape", "x.reshape(x.shape[0], -1, size)", 0) in found
    assert {"y *= 5", "y / 2", "partial(folded, size=4)(y / 2)"} & {text for _, text, _ in found} == {"y *= 5", "y / 2"}


FORWARD = ("function(self, *args, **kwargs)", 0)


@pytest.mark.parametrize(
    ("path", "place", "value"),
    [
        ((FORWARD, ("self.folded(x)", 0), ("folded(x, 4)", 0), ("x.reshape(x.shape[0], -1, size)", 0)), 2, 6),
        ((FORWARD, ("torch.zeros(len(x), 12, dtype=x.dtype)", 0)), 1, 8),
        ((FORWARD, ("x[:, :half]", 0)), 5, 3),
    ],
)
def test_only_the_call_that_is_named_takes_the_number(path: Any, place: int, value: int) -> None:
    model, x = Everything().eval(), torch.randn(3, 12)
    assert model(x).shape == (3, 3, 4)
    perform(model, Number("", Written(path, place, 0), value))
    with pytest.raises(RuntimeError):  # the others do not fit any more
        model(x)
    fresh = replay(Everything().eval(), [encoded(edit) for edit in edits(model)])
    with pytest.raises(RuntimeError):
        fresh(x)


def test_a_number_that_is_computed_with_is_kept() -> None:
    model, x = Everything().eval(), torch.randn(3, 12)
    before = model(x)
    perform(model, Number("", Written((FORWARD, ("y *= 5", 0)), 1, 5), 5))
    assert torch.equal(model(x), before)
    perform(model, Number("", Written((FORWARD, ("y / 2", 0)), 1, 2), 4.0))
    assert not torch.equal(model(x), before)


def test_places_count_what_is_in_sequences_and_slices() -> None:
    given = (1, (2, 3), slice(None, 4), [5])
    assert leaves(given, {"size": 6}) == [1, 2, 3, None, 4, None, 5, 6]
    assert with_leaves(given, {"size": 6}, {2: 30, 4: 40, 7: 60}) == (
        [1, (2, 30), slice(None, 40, None), [5]],
        {"size": 60},
    )


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(SiteError, match="has no call"):
        perform(Everything(), Number("", Written((("x.view(9)", 0),), 0, 9), 8))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x).view(-1, 8)))
        return y


@pytest.mark.parametrize("first", [0, 1])
def test_it_composes_with_calls_that_have_become_modules(first: int) -> None:
    changes = [Number("", Written((("self.a(x).view(-1, 8)", 0),), 1, 8), 4), Externalise("", (("relu", 0),))]
    model = Gated()
    for change in changes if first == 0 else changes[::-1]:
        perform(model, change)
    model.b = nn.Linear(4, 4)
    assert model(torch.randn(2, 4)).shape == (4, 4)
    assert isinstance(model.get_submodule("relu_0"), nn.ReLU)
