"""A recorded pass, followed channel by channel: the layout of every axis of every value.

    followed = Following(trace_forward(model, example_inputs))
    followed.axes(value)                # one layout for each axis of a value, parameters included

Each operation has a rule (see `rules/`) that says how it moves and ties the channels of what it reads. An operation
without a rule closes all channels that it reads, and is the reason that people are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shallower.errors import SiteError
from shallower.finding.channels.indices import carry_indices
from shallower.finding.channels.layout import ONE, Layout, Run, close, fixed, resolved, runs, tie
from shallower.finding.channels.standing_in import follow_unrun
from shallower.finding.channels.turns import Turns, carry_turns, close_picked
from shallower.recording.tracing import Call, Trace, Value

Axes = list[Layout]
Rule = Callable[["Following", Call], Axes | list[Axes]]
RULES: dict[str, Rule] = {}
"""The rule of each operation, by the canonical name of the function."""


UNFORESEEN = (AssertionError, IndexError, KeyError, TypeError, ValueError)
"""What a rule raises at a use that nobody thought of, which is an unknown one, too."""


class UnknownUseError(Exception):
    """A rule does not know this use of its operation; the message says why, "" where nothing is to be said."""


def rule(functions: str, *, replace: bool = False) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations.

        @rule("relu gelu")
        def same(f, call):
            return f.axes(call.inputs[0])

    A rule is given the `Following` and the call. It ties what goes together and returns the axes of the result: a list
    of layouts, or a list of these for several results. It raises `UnknownUseError` where it does not know this use.

    Args:
        functions: canonical names, with spaces between.
        replace: whether the rules that some of them have already go.

    Raises:
        SiteError: one of them has a rule already, and `replace` is false.
    """
    known = [name for name in functions.split() if name in RULES]
    if known and not replace:
        raise SiteError(f"`{known[0]}` has a rule already: rule({functions!r}, replace=True) takes its place")

    def registered(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions.split(), made))
        return made

    return registered


class Following:
    """The layouts of all values of a trace.

    Args:
        trace: a recorded pass.
        returned: why what it returns stays; "" where it need not.

    Attributes:
        trace: the recorded pass.
        written, contracted: the calls that give channels of a layout as linear maps, and those that add them up.
        sums: calls that add two values which depend on the inputs.
        averages: layouts over which a call takes an average.
        choices: what a call chooses among, which of its input's dimensions that is, and how many it needs.
        numbers: values that are numbers of channels, and of which.
        unchosen: values that are zero at channels of a layout that are never chosen.
        turns: of loops over channels and lists of modules.
        stand_ins: calls that were not made but would have been (see `standing_in.py`), each with one that was.
        twins: entries of lists that did not run, each with the one in whose place it was followed.
    """

    def __init__(self, trace: Trace, returned: str = "the model returns it") -> None:
        self.trace = trace
        self.written: list[tuple[Layout, Call]] = []
        self.contracted: list[tuple[Layout, Call]] = []
        self.sums: list[Call] = []
        self.averages: list[tuple[Layout, Call]] = []
        self.choices: list[tuple[Layout, Call, int, int]] = []
        self.numbers: dict[Value, Layout] = {}
        self.unchosen: dict[Value, Layout] = {}
        self.turns = Turns(trace)
        self.stand_ins: dict[Call, Call] = {}
        self.twins: dict[str, str] = {}
        self._axes: dict[Value, Axes] = {}
        for call in trace.calls:
            self.follow(call)
        close_picked(self)
        follow_unrun(self)
        for value in list(self._axes):
            if value.output and returned and not _is_normed_weight(value):
                self.close_axes(value, returned)

    def axes(self, value: Value) -> Axes:
        """The layouts of a value's axes, as they are known now."""
        known = self._axes.get(value)
        if known is None:
            known = self._axes[value] = [_new(value, size) for size in value.shape]
        return [resolved(axis) for axis in known]

    def close_axes(self, value: Value, reason: str) -> None:
        """No channel of a value may be cut."""
        for axis in self.axes(value):
            close(axis, reason)
        if value in self.numbers:
            close(self.numbers[value], reason)

    def title(self, call: Call) -> str:
        """A call, for people."""
        return f"`{call.name}` in {call.frame.name or type(call.frame.module).__name__}"

    def follow(self, call: Call) -> None:
        """Say where the channels go that a call reads."""
        if call.outputs:
            self._follow(call)
        carry_indices(self, call)
        carry_turns(self, call)

    def _follow(self, call: Call) -> None:
        made = RULES.get(call.name)
        self._now = call
        reason = ""
        if made is not None:
            try:
                if self._take(call, made(self, call)):
                    return
            except UnknownUseError as error:
                reason = str(error)
            except UNFORESEEN:
                pass
        self._without_rule(call, reason)

    def _take(self, call: Call, found: Axes | list[Axes]) -> bool:
        """Keep the axes that a rule gives, where they are those of the results."""
        several: list[Axes] = []
        single: Axes = []
        for item in found:
            if isinstance(item, list):
                several.append(item)
            else:
                single.append(item)
        several = several or [single]
        if len(several) != len(call.outputs):
            return False
        for value, axes in zip(call.outputs, several, strict=True):
            if tuple(axis.size for axis in axes) != value.shape:
                return False
        self._axes.update(zip(call.outputs, several, strict=True))
        return True

    def _without_rule(self, call: Call, reason: str) -> None:
        """An operation that nothing is known of: what it reads is closed, and what it gives."""
        reason = reason or f"it is not known how {self.title(call)} moves channels"
        for value in call.inputs:
            self.close_axes(value, reason)
        for value in call.outputs:
            self._axes[value] = [fixed(size, reason) for size in value.shape]

    def contract(self, call: Call, channels: Layout, columns: Layout) -> None:
        """A linear map adds up channels, each with its column; that of two results marks them "inner"."""
        tie(channels, columns)
        self.add_up(call, columns)

    def add_up(self, call: Call, channels: Layout) -> None:
        """A product adds up channels; where both factors depend on the inputs, they are marked "inner"."""
        self.contracted.append((channels, call))
        if sum(value.fed for value in call.inputs) > 1:
            self.mark(channels, "inner")

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

    def tied(self, values: Iterable[Value]) -> Axes:
        """The axes of an elementwise result: axes at the same place from the right go together."""
        found: Axes = []
        for value in values:
            found = self.broadcast(found, self.axes(value))
        return found

    def mark(self, layout: Layout, what: str) -> None:
        """Say something of all runs of a layout: "averaged", "attended"."""
        for run in runs(layout):
            run.marks.add(what)
        if what == "averaged":
            self.averages.append((layout, self._now))


def leads_out(value: Value) -> bool:
    """Whether the model returns something that is computed of a value, or keeps it."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        if current.output:
            return True
        for call in current.readers:
            made = [other for other in call.outputs if other not in seen]
            waiting += made
            seen.update(made)
    return False


def _is_normed_weight(value: Value) -> bool:
    """Whether it is a weight that a layer computes anew in every pass, and keeps in an attribute."""
    return value.call is not None and value.call.name == "weight_norm"


def _new(value: Value, size: int) -> Layout:
    if size == 1:
        return fixed(1, ONE)
    if value.origin == "input":
        return fixed(size, "it has the size of an input")
    if value.origin == "unknown":
        return fixed(size, "it comes from a tensor that no recorded operation makes")
    return Run(size)
