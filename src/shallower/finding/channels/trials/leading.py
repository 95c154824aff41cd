"""A pass of a model some of whose channels are cut, led by what the layouts say.

    led = Led(followed, {run: 5})
    led.run(model_with_five_channels, inputs)
    led.wrong                   # the sizes that the forward did not give as they have to be
    led.blamed                  # the calls that gave something else although their sizes were right

A size that is wrong is put right, and a result of another shape is replaced, so that one pass shows everything that
does not follow, and not the first thing only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.failures import is_out_of_memory
from shallower.core.inputs import Inputs
from shallower.core.trees import mapped, tensors
from shallower.errors import ShallowerError
from shallower.finding.channels.following import Axes, Following
from shallower.finding.channels.layout import Run, all_runs, fixed, size_left
from shallower.finding.channels.trials.dataless import Results
from shallower.finding.channels.trials.sizes import SIZED, Sizing, sizes_of
from shallower.modules.written import Waypoint, leaves, way_to, with_leaves
from shallower.recording.names import canonical, is_metadata
from shallower.recording.tracing import Call, Frame, StoppedError, Trace, Value, trace_forward

SLOW = {"interpolate", "grid_sample"}
"""Functions that take long without data, too, and whose results have the channels that they read."""


@dataclass(frozen=True)
class Wrong:
    """A size that a forward gives and that does not follow.

    Attributes:
        at: number of the call in the recorded pass.
        size: which.
        way: how the forward came to the call.
    """

    at: int
    size: Sizing
    way: tuple[Waypoint, ...]


class _OutOfStepError(RuntimeError):
    """The pass makes other calls than the recorded one."""


class Expected:
    """What a recorded pass gives its calls: worked out once for all passes that are led.

    Attributes:
        sizes: of each call.
        computed: the numbers that each call computes with; None where no result depends on it, as on a check.
        results: what functions give without data.
        tensors: the parameters and buffers by name.
    """

    def __init__(self, f: Following) -> None:
        self.f = f
        self.calls = f.trace.calls
        self.sizes = [sizes_of(f, call) for call in self.calls]
        self.computed: list[list[float] | None] = []
        self.results = Results()
        self.tensors: dict[str, Value] = {}
        for (module, attribute), value in chain(f.trace.weights.items(), f.trace.buffers.items()):
            self.tensors[f"{f.trace.names[module]}.{attribute}".lstrip(".")] = value
        used = _used_calls(f.trace)
        for call, sizes in zip(self.calls, self.sizes, strict=True):
            numbers = None
            if call in used:
                numbers = _computed_numbers(call.name, leaves(call.args, call.kwargs), sizes)
            self.computed.append(numbers)
        self._axes: dict[Value, tuple[Axes, set[Run]]] = {}

    def keep(self, i: int, place: int) -> None:
        """Let a number that a call computes with be what it is, and not blame the call for another."""
        call, computed = self.calls[i], self.computed[i]
        if computed is None or call.name in SIZED or any(size.place == place for size in self.sizes[i]):
            return
        given = leaves(call.args, call.kwargs)
        self.sizes[i].append(Sizing(place, given[place], fixed(1, "a number"), stays=True))
        self.computed[i] = _computed_numbers(call.name, given, self.sizes[i])

    def shape(self, value: Value, fewer: Mapping[Run, int]) -> tuple[int, ...]:
        """The shape of a value when some runs have fewer channels."""
        if value not in self._axes:
            axes = self.f.axes(value)
            self._axes[value] = axes, set(all_runs(axes))
        axes, inside = self._axes[value]
        if inside.isdisjoint(fewer):
            return value.shape
        shape: list[int] = []
        for axis in axes:
            shape.append(size_left(axis, fewer))
        return tuple(shape)


class Led:
    """A pass, and what it showed.

    Attributes:
        wrong: sizes that do not follow, by the number of the call and the place.
        blamed: calls that gave something else or computed with other numbers.
        ended: the call before which the pass came to its end too early; None where it did not.
    """

    def __init__(self, expected: Expected, fewer: Mapping[Run, int]) -> None:
        self.expected = expected
        self.fewer = fewer
        self.wrong: dict[tuple[int, int], Wrong] = {}
        self.blamed: set[int] = set()
        self.ended: int | None = None
        self._made = [i for i, call in enumerate(expected.calls) if expected.f.turns.is_made(call, fewer)]

    @property
    def is_clean(self) -> bool:
        """Whether everything was as the layouts say."""
        return not self.wrong and not self.blamed and self.ended is None

    @property
    def entries(self) -> set[tuple[int, int]]:
        """What was not as the layouts say: (number of the call, place), with place -1 for a call that is blamed."""
        return {*self.wrong, *((at, -1) for at in self.blamed)}

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        """Run a model with these channels cut."""
        try:
            trace = trace_forward(model, inputs, self.lead)
            if len(trace.calls) != len(self._made):
                self.ended = self._number(trace)
        except StoppedError as stopped:
            if stopped.__cause__ is not None and is_out_of_memory(stopped.__cause__):
                raise
            self.ended = self._number(stopped.trace)
        except (ShallowerError, RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            self.ended = 0

    def _number(self, trace: Trace) -> int:
        """The number that the next call has in the recorded pass."""
        now = len(trace.calls)
        return self._made[now] if now < len(self._made) else len(self.expected.calls)

    def lead(
        self, trace: Trace, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:  # fmt: skip
        """Run one function."""
        i, name = self._number(trace), canonical(function)
        if is_metadata(name):
            return function(*args, **kwargs)
        if i >= len(self.expected.calls) or self.expected.calls[i].name != name:
            raise _OutOfStepError(f"`{name}` instead of another call")
        call, sizes = self.expected.calls[i], self.expected.sizes[i]
        given = leaves(args, kwargs)
        # numbers to compute with cannot be told from those that the inputs' sizes are in: a call with others is blamed
        computed = self.expected.computed[i]
        if computed is not None and computed != _computed_numbers(name, given, sizes):
            self.blamed.add(i)
        right = self._put_right(i, frame, sizes, given)
        if right:
            changed, kwargs = with_leaves(args, kwargs, right)
            args = tuple(changed)
        if name in SLOW and all(t.is_meta for t in tensors(args)):
            return self._instead(call, args, None)
        try:
            result = self.expected.results.of(function, args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self.blamed.add(i)
            return self._instead(call, args, None)
        return self._checked(i, call, args, result)

    def _put_right(self, i: int, frame: Frame, sizes: Iterable[Sizing], given: Sequence[Any]) -> dict[int, float]:
        """The sizes that the layouts say, at the places of those that are others."""
        right: dict[int, float] = {}
        for size in sizes:
            number = given[size.place] if size.place < len(given) else None
            if type(number) is not type(size.given) or number == -1 != size.given or size.is_right(number, self.fewer):
                continue
            right[size.place] = size.expected(self.fewer)
            self.wrong[i, size.place] = Wrong(i, size, way_to(_calling(), frame.module))
        return right

    def _shapes(self, call: Call) -> list[tuple[int, ...]]:
        return [self.expected.shape(value, self.fewer) for value in call.outputs]

    def _checked(self, i: int, call: Call, args: Sequence[Any], result: Any) -> Any:
        """A result, where it has the shapes that the layouts say; others where it has not."""
        made = [result]
        if not isinstance(result, Tensor):
            made = list({id(t): t for t in tensors(result)}.values())
        if not made:
            return result
        shapes = self._shapes(call)
        if len(made) != len(shapes):
            # what was written into counts, too, and a parameter that is only passed on does not
            return result
        if [t.shape for t in made] == shapes:
            return result
        if not _depends_on_data(call, args, self.expected.sizes[i]):
            self.blamed.add(i)
        return self._instead(call, args, result)

    def _instead(self, call: Call, args: Sequence[Any], result: Any) -> Any:
        """A result of the right shapes, of the form of a result where there is one."""
        if call.inplace or not call.outputs:
            return args[0] if args and call.name != "setitem" else None
        blanks = iter(_blanks(self._shapes(call), list(tensors(args)), list(tensors(result))))
        if result is not None:
            return mapped(lambda tensor: next(blanks, tensor), result)
        found = tuple(blanks)
        return found if len(found) > 1 else found[0]


def _depends_on_data(call: Call, args: Sequence[Any], sizes: Sequence[Sizing]) -> bool:
    """Whether the numbers of a tensor, which a trial has not, say of what shape a result is."""
    if call.name == "split" and not sizes:
        return len(args) > 1 and isinstance(args[1], (list, tuple))
    if call.name in ("where", "nonzero", "unique", "masked_select", "argwhere"):
        return len(call.inputs) == 1 or call.name == "masked_select"
    return call.name == "getitem" and any(t.dtype == torch.bool for t in tensors(args[1:]))


def _calling() -> FrameType | None:
    """The frame that calls the function which is recorded now."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__torch_function__":
        frame = frame.f_back
    return None if frame is None else frame.f_back


def _blanks(shapes: Sequence[tuple[int, ...]], read: Sequence[Tensor], made: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of zeros of some shapes, of the type of what a call read or made."""
    like = next((t for t in (*made, *read) if t.is_floating_point()), None)
    if like is None:
        like = next(iter((*made, *read)), torch.empty(0))
    return [like.new_zeros(shape) for shape in shapes]


def _used_calls(trace: Trace) -> set[Call]:
    """The calls on which something depends that the model returns, keeps or writes into."""
    found: set[Call] = set()
    waiting = list(trace.cached)
    for call in trace.calls:
        waiting += filter(attrgetter("output"), call.outputs)
        if call.inplace:
            found.add(call)
            waiting += call.inputs
    while waiting:
        made = waiting.pop().call
        if made is not None and made not in found:
            found.add(made)
            waiting += made.inputs
    return found


def _computed_numbers(name: str, given: Sequence[Any], sizes: Iterable[Sizing]) -> list[float]:
    """The numbers that a call computes with: those that are no sizes."""
    found: list[float] = []
    for place, item in enumerate(given):
        is_number = type(item) is int and name not in SIZED and all(size.place != place for size in sizes)
        if is_number or type(item) is float:
            found.append(item)
    return found
