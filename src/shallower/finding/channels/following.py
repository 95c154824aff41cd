"""A recorded pass, followed channel by channel: the layout of every axis of every value.

    followed = Following(trace_forward(model, example_inputs))
    followed.axes(value)                # one layout for each axis of a value, parameters included

Each operation has a rule (see `rules/`) that says how it moves and ties the channels of what it reads. An operation
without a rule closes all channels that it reads, and is the reason that people are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shallower.finding.channels.layout import ONE, Layout, Run, close, fixed, is_open, resolved, tie
from shallower.recording.tracing import Call, Trace, Value

Axes = list[Layout]
Rule = Callable[..., Axes | list[Axes] | None]
RULES: dict[str, tuple[tuple[str, ...], Rule]] = {}
"""By the canonical name of a function: the names of its arguments, and its rule."""


def rule(functions: str, arguments: str = "") -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations.

        @rule("relu gelu", "input")
        def same(f, call, input):
            return f.axes(input)

    A rule is given the `Following`, the call and its arguments by name, and returns the axes of the result: a list of
    layouts, or a list of these for several results; None where it does not know this use.

    Args:
        functions: canonical names, with spaces between.
        arguments: names of the arguments in order; what is left of them is not given.
    """

    def registered(made: Rule) -> Rule:
        for name in functions.split():
            RULES[name] = tuple(arguments.split()), made
        return made

    return registered


class Following:
    """The layouts of all values of a trace.

    Attributes:
        trace: the recorded pass.
        written, contracted: the calls that give channels of a layout as linear maps, and those that add them up.
        sums: layouts that are the sum of two values which depend on the inputs.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.written: list[tuple[Layout, Call]] = []
        self.contracted: list[tuple[Layout, Call]] = []
        self.sums: list[Layout] = []
        self._axes: dict[Value, Axes] = {}
        for call in trace.calls:
            if call.outputs:
                self._follow(call)
        for value in list(self._axes):
            if value.output:
                self.close_axes(value, "the model returns it")

    def axes(self, value: Value) -> Axes:
        """The layouts of a value's axes, as they are known now."""
        known = self._axes.get(value)
        if known is None:
            known = self._axes[value] = [self._new(value, size) for size in value.shape]
        return [resolved(axis) for axis in known]

    def _new(self, value: Value, size: int) -> Layout:
        if size == 1:
            return fixed(1, ONE)
        if value.origin == "input":
            return fixed(size, "it has the size of an input")
        if value.origin == "unknown":
            return fixed(size, "it is made out of sight")
        return Run(size)

    def close_axes(self, value: Value, reason: str) -> None:
        """No channel of a value may be cut."""
        for axis in self.axes(value):
            close(axis, reason)

    def title(self, call: Call) -> str:
        """A call, for people."""
        return f"`{call.name}` in {call.frame.name or type(call.frame.module).__name__}"

    def _follow(self, call: Call) -> None:
        names, made = RULES.get(call.name, ((), None))
        found = None
        if made is not None:
            found = made(self, call, *_arguments(names, call))
        if found is not None:
            several = found if found and isinstance(found[0], list) else [found]
            shapes = [tuple(axis.size for axis in axes) for axes in several]
            if shapes == [value.shape for value in call.outputs]:
                for value, axes in zip(call.outputs, several, strict=True):
                    self._axes[value] = axes
                return
        self.without_rule(call)

    def without_rule(self, call: Call) -> None:
        """An operation that nothing is known of: what it reads is closed, and what it gives."""
        reason = f"it is not known how {self.title(call)} moves channels"
        inputs_open = False
        for value in call.inputs:
            inputs_open |= any(map(is_open, self.axes(value)))
            self.close_axes(value, reason)
        for value in call.outputs:
            if call.inputs and (inputs_open or value.fed):
                self._axes[value] = [fixed(size, reason) for size in value.shape]

    def contract(self, call: Call, channels: Layout, columns: Layout) -> None:
        """A linear map adds up channels, each with its column."""
        tie(channels, columns)
        self.contracted.append((columns, call))

    def write(self, call: Call, rows: Layout, bias: Value | None) -> None:
        """A linear map gives channels, each with its row and its bias."""
        if bias is not None:
            tie(rows, self.axes(bias)[-1])
        self.written.append((rows, call))

    def broadcast(self, first: Axes, second: Axes) -> Axes:
        """Axes of two tensors side by side from the right: those of one position follow the other's."""
        if len(first) < len(second):
            first, second = second, first
        found = list(first)
        for i, axis in enumerate(second, len(first) - len(second)):
            if found[i].size == 1:
                found[i] = axis
            elif axis.size > 1:
                tie(found[i], axis)
        return found

    def tied(self, values: Sequence[Value | None], shape: tuple[int, ...]) -> Axes:
        """The axes of an elementwise result of that shape: axes at the same place from the right go together."""
        found: Axes = [fixed(1, ONE) for _ in shape]
        for value in values:
            if value is not None:
                found = self.broadcast(found, self.axes(value))
        return found


def _arguments(names: tuple[str, ...], call: Call) -> list[Any]:
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    if names and names[0] not in given and "self" in given:
        given[names[0]] = given["self"]
    return [given.get(name) for name in names]
