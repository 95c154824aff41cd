"""Of which sizes the numbers are made that a forward computes with, carried along by Python's arithmetic.

    made_of(expected, model, inputs)    # {(4, 1): {layout}}: x * (x.shape[-1] // self.heads) ** -0.5 is call 4

What a forward reads of the shape of a tensor remembers the axis, and so does every sum, product and power of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shallower.core.inputs import Inputs
from shallower.core.trees import tensors
from shallower.errors import ShallowerError
from shallower.finding.channels.layout import Layout
from shallower.modules.written import leaves, with_leaves
from shallower.recording.names import canonical, is_metadata
from shallower.recording.tracing import Frame, Trace, trace_forward

if TYPE_CHECKING:
    from shallower.finding.channels.trials.leading import Expected

Axes = frozenset[Layout]


class _Whole(int):
    """A whole number that remembers the axes of whose sizes it is made."""

    axes: Axes = frozenset()


class _Real(float):
    """Any other number that does."""

    axes: Axes = frozenset()


def _made_of(number: Any, axes: Axes) -> Any:
    if type(number) not in (int, float):
        return number
    made: Any = (_Whole if type(number) is int else _Real)(number)
    made.axes = axes
    return made


def _plain(number: Any) -> Any:
    if isinstance(number, _Whole):
        return int.__int__(number)
    return float.__float__(number) if isinstance(number, _Real) else number


def _axes_of(number: Any) -> Axes:
    return number.axes if isinstance(number, (_Whole, _Real)) else frozenset()


def _of_two(apply: Callable[[Any, Any], Any], *, turned: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        first, second = (other, self) if turned else (self, other)
        return _made_of(apply(_plain(first), _plain(second)), _axes_of(first) | _axes_of(second))

    return method


def _of_one(apply: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: _made_of(apply(_plain(self)), self.axes)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _kind in (_Whole, _Real):
        setattr(_kind, f"__{_name}__", _of_two(getattr(operator, _name), turned=False))
        setattr(_kind, f"__r{_name}__", _of_two(getattr(operator, _name), turned=True))
for _name in ("neg", "pos", "abs"):
    for _kind in (_Whole, _Real):
        setattr(_kind, f"__{_name}__", _of_one(getattr(operator, _name)))


def made_of(expected: Expected, model: nn.Module, inputs: Inputs) -> dict[tuple[int, int], Axes]:
    """For the numbers that calls are given, by the call and the place, the axes of whose sizes they are made.

    Args:
        expected: the recorded pass.
        model: a copy of the recorded one, as it was.
        inputs: what it is called with.
    """
    reading = _Reading(expected, model)
    try:
        trace_forward(model, inputs, reading.lead)
    except ShallowerError:  # something took no number for what it is
        return {}
    return reading.found


class _Reading:
    """Leads a pass, and gives sizes that remember their axes."""

    def __init__(self, expected: Expected, model: nn.Module) -> None:
        self.expected = expected
        self.found: dict[tuple[int, int], Axes] = {}
        self._alive: list[Tensor] = []
        self._axes: dict[int, list[Layout]] = {}
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in own.items():
            value = expected.tensors.get(name)
            if value is not None:
                self._axes[id(tensor)] = expected.f.axes(value)

    def lead(
        self, trace: Trace, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:  # fmt: skip
        """Run one function."""
        del frame
        name, i = canonical(function), len(trace.calls)
        given = leaves(args, kwargs)
        plain: dict[int, float] = {}
        for place, item in enumerate(given):
            if isinstance(item, (_Whole, _Real)):
                plain[place] = _plain(item)
        if plain:
            own, kwargs = with_leaves(args, kwargs, plain)
            args = tuple(own)
        result = function(*args, **kwargs)
        if is_metadata(name):
            return self._remembered(name, args, result)
        for place in plain:
            self.found[i, place] = _axes_of(given[place])
        calls = self.expected.calls
        made = list({id(t): t for t in tensors(result)}.values())
        if i < len(calls) and calls[i].name == name and len(made) == len(calls[i].outputs):
            for tensor, value in zip(made, calls[i].outputs, strict=True):
                self._alive.append(tensor)
                self._axes[id(tensor)] = self.expected.f.axes(value)
        return result

    def _remembered(self, name: str, args: tuple[Any, ...], result: Any) -> Any:
        """A size, or a shape whose sizes remember the axes."""
        axes = self._axes.get(id(args[0])) if args else None
        if axes is None or name not in ("get.shape", "size"):
            return result
        if isinstance(result, torch.Size) and len(result) == len(axes):
            return torch.Size([_made_of(size, frozenset([axis])) for size, axis in zip(result, axes, strict=True)])
        if type(result) is int and len(args) > 1:
            return _made_of(result, frozenset([axes[args[1]]]))
        return result
