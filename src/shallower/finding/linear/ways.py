"""Where the channels go that a linear map makes: forward from its result to the maps that read them.

ways = Ways(followed, Graph(trace))
hidden = ways.hidden(map)           # what its channels pass, what reads them, and why they may not become linear
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shallower.finding.channels.following import RULES, Following
from shallower.finding.channels.layout import all_runs
from shallower.finding.linear.units import Graph, Step, Unit, channel_dim, made_by
from shallower.finding.pointwise import (
    DROPOUT,
    UNCHANGED,
    averages_all,
    describe,
    flattens,
    halves,
    is_nonlinear,
    is_pointwise,
    moving,
    pools,
    writes_out_features,
)
from shallower.recording.tracing import Call, Value

WORDS = {"norms": "the norm ", "images": "the pooling ", "reducing": "the pooling ", "shaping": "the reshape "}
"""What a call is for people, by the room of its rule."""


@dataclass(eq=False)
class Chain:
    """Pointwise calls with one input and one result, in order of execution.

    Attributes:
        calls: what is called; none at the ends that changes nothing.
        entry, exit: the value it reads and the value it gives.
        end: what has become of the exit where nothing but copies and dropouts is behind it.
        active: whether it is an activation, not just a scale and a shift.
    """

    calls: list[Call]
    entry: Value
    exit: Value
    end: Value
    active: bool


Passed = Step | Chain


@dataclass(frozen=True)
class Way:
    """How channels come from a map to a value.

    Attributes:
        steps: what they have passed, in order of execution.
        half: which half of the map's rows they are, -1 where they are all.
        reason: why they may not become linear, "" where nothing met is against it.
    """

    steps: tuple[Passed, ...] = ()
    half: int = -1
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether an activation is among the steps."""
        return any(isinstance(step, Chain) and step.active for step in self.steps)

    def past(self, step: Passed, reason: str = "", half: int | None = None) -> Way:
        """The way past one more step."""
        return Way((*self.steps, step), self.half if half is None else half, self.reason or reason)


@dataclass(eq=False)
class Hidden:
    """What becomes of the channels that a map makes.

    Attributes:
        root: the map, usable or not.
        ways: the values in which its channels are.
        ends: the maps that read them, each with the way to it.
        sums: the sums with other tensors that depend on the inputs, each with the way to it.
        products: products with tensors that are made of other channels.
        readers: everything that reads the channels before anything is met that is against linear.
    """

    root: Step
    ways: dict[Value, Way] = field(default_factory=dict)
    ends: list[tuple[Step, Way]] = field(default_factory=list)
    sums: list[tuple[Call, Way]] = field(default_factory=list)
    products: list[Call] = field(default_factory=list)
    readers: dict[Passed, None] = field(default_factory=dict)


class Ways:
    """The ways from all linear maps of a followed pass.

    Attributes:
        graph: the pass.
        chains: the activations, scales and shifts in it.
    """

    def __init__(self, f: Following, graph: Graph) -> None:
        self.f = f
        self.graph = graph
        self.chains = list(chains_of(graph))
        self._ending = {call for _, call in f.contracted}
        self._from: dict[Value, list[Chain]] = {}
        for chain in self.chains:
            self._from.setdefault(chain.entry, []).append(chain)
        self.all: dict[Step, Hidden] = {}
        for step in graph.steps(f.trace.calls):
            if graph.is_map(step):
                self.all[step] = self._follow(step)

    def _follow(self, root: Step) -> Hidden:
        hidden = Hidden(root)
        result = made_by(root)[0]
        hidden.ways[result] = Way()
        waiting = set(self._readers(result))
        while waiting:
            step = min(waiting, key=self._position)
            waiting.remove(step)
            read = [value for value in _inputs(step) if value in hidden.ways]
            own = [hidden.ways[value] for value in read]
            if not all(way.reason for way in own) or not own:
                hidden.readers[step] = None
            if not own:  # it reads the channels beside what it is a step of
                continue
            way = _joined_ways(own)
            for value, onward in self._past(hidden, step, read, way):
                hidden.ways[value] = onward
                waiting.update(self._readers(value))
            if isinstance(step, Chain):
                # what looks into an activation reads the channels, too
                for call in step.calls[:-1]:
                    for value in call.outputs:
                        hidden.ways[value] = way.past(step)
                        waiting.update(r for r in self.graph.steps(value.readers) if r not in step.calls)
        return hidden

    def _position(self, step: Passed) -> int:
        return self.graph.position(step.calls[0] if isinstance(step, Chain) else step)

    def _readers(self, value: Value) -> Iterator[Passed]:
        chains = self._from.get(value, [])
        yield from chains
        for step in self.graph.steps(value.readers):
            if not any(step in chain.calls for chain in chains):
                yield step

    def _past(self, hidden: Hidden, step: Passed, read: list[Value], way: Way) -> Iterator[tuple[Value, Way]]:
        """Where the channels are behind a step."""
        if isinstance(step, Chain):
            why = f"{self.graph.title(step.calls[-1])} stands behind the gate's product"
            yield step.exit, way.past(step, why if _is_gated(way) else "")
        elif isinstance(step, Unit) and step.kind != "map":
            yield step.result, way.past(step, step.problem)
        elif self.graph.is_map(step):
            inputs = [step.source] if isinstance(step, Unit) else [v for v in step.inputs if v.dynamic][:1]
            if read[0] in inputs:
                hidden.ends.append((step, way))
        elif isinstance(step, Call) and step.outputs:
            yield from self._past_call(hidden, step, read, way)

    def _past_call(self, hidden: Hidden, call: Call, read: list[Value], way: Way) -> Iterator[tuple[Value, Way]]:
        result, first = call.outputs[0], call.inputs[0]
        if call.name in UNCHANGED | DROPOUT:
            if first in read:
                yield result, way.past(call)
            return
        gated, flat = _is_gated(way), flattens(call)
        averages = averages_all(call) or flat == (1, 1)
        passes = averages or (not gated and (flat is not None or pools(call)))
        if passes and first in read and (way.active or gated) and channel_dim(hidden.root, 4) == 1:
            fixed = flat not in (None, (1, 1)) and writes_out_features(call)
            why = f"the reshape {self.graph.title(call)} says how many features there are; flatten(1) would not"
            yield result, way.past(call, why if fixed else "")
            return
        parts = halves(call, channel_dim(hidden.root, len(first.shape))) if first in read and way.half < 0 else []
        for value, index in parts:
            yield value, way.past(call, half=index)
        if parts:
            return
        if is_pointwise(call):
            yield from self._past_pointwise(hidden, call, read, way)
            return
        if call in self._ending:
            return
        word = WORDS.get(_room(call), "") if first in read else ""
        reason = f"{word}{self.graph.title(call)} stands in between"
        passed: Passed = call
        if call.name == "glu":
            passed, reason = Chain([call], first, result, result, True), "gate and product are one function (glu)"
        elif call.name in ("cat", "concat", "concatenate"):
            reason = f"it is concatenated with other tensors by {self.graph.title(call)}"
        for value in call.outputs:
            if value.elements > 1 and (word or self._holds(value, hidden)):
                yield value, way.past(passed, reason)

    def _past_pointwise(self, hidden: Hidden, call: Call, read: list[Value], way: Way) -> Iterator[tuple[Value, Way]]:
        """Past a call that is no part of a chain, since it reads several tensors."""
        result, title = call.outputs[0], self.graph.title(call)
        others = [value for value in moving(call) if value not in read]
        live = [value for value in others if value.dynamic]
        parts = {hidden.ways[value].half for value in read}
        if call.name in ("add", "sub") and live:
            hidden.sums.append((call, way))
            if live[0].origin == "computed":
                return
        if any(value.shape != result.shape for value in read):
            return
        if call.name == "mul" and len(moving(call)) == 2 and (len(live) == 1 or len(parts) > 1):
            hidden.products.append(call)
            again = "its product with another tensor is multiplied again" if _is_gated(way) else ""
            yield result, way.past(call, again, half=-1)
        elif live:
            yield result, way.past(call, f"another tensor ({describe(live[0])}) is mixed in by {title}")
        elif others:
            yield result, way.past(call, f"a tensor with more than one element ({describe(others[0])}) is mixed in")
        else:
            yield result, way.past(call, f"the hidden tensor is also read by {title}")

    def _holds(self, value: Value, hidden: Hidden) -> bool:
        """Whether channels that a map makes are in a value, or some that go with them."""
        result = next(iter(hidden.ways))
        own = all_runs(self.f.axes(result))
        return any(run in own for run in all_runs(self.f.axes(value)) if run.size > 1)


def _is_gated(way: Way) -> bool:
    """Whether channels have been multiplied with another tensor."""
    return any(isinstance(step, Call) and step.name == "mul" for step in way.steps)


def _room(call: Call) -> str:
    made = RULES.get(call.name)
    return made.__module__.rpartition(".")[2] if made is not None else ""


def _inputs(step: Passed) -> list[Value]:
    if isinstance(step, Chain):
        return [step.entry]
    return [step.source] if isinstance(step, Unit) else step.inputs


def _joined_ways(ways: list[Way]) -> Way:
    """One way for the values that a call reads."""
    if len(ways) == 1:
        return ways[0]
    steps: dict[Passed, None] = {}
    for way in ways:
        steps.update(dict.fromkeys(way.steps))
    reason = next((way.reason for way in ways if way.reason), "")
    same = all(way.half == ways[0].half for way in ways)
    return Way(tuple(steps), ways[0].half if same else -1, reason)


def chains_of(graph: Graph) -> Iterator[Chain]:
    """The pointwise calls of a pass, as many together as have one input and one result that others read."""
    roots: dict[Value, Value] = {}
    for call in graph.trace.calls:
        if call not in graph.unit_of and is_pointwise(call) and call.outputs:
            found = {roots.get(value, value) for value in moving(call)}
            if len(found) == 1:
                roots[call.outputs[0]] = found.pop()
    ends: set[Value] = set()
    for value, root in roots.items():
        made = [made for reader in value.readers for made in reader.outputs or [value]]
        if not made or any(roots.get(each) is not root for each in made):
            ends.add(value)
    for end in sorted(ends, key=lambda value: graph.position(value.call) if value.call else 0):
        calls: list[Call] = []
        entries: set[Value] = set()
        waiting = [end]
        while waiting:
            value = waiting.pop()
            if value.call is None or (value is not end and value in ends) or value not in roots:
                entries.add(value)
            elif value.call not in calls:
                calls.append(value.call)
                waiting += moving(value.call)
        calls.sort(key=graph.position)
        if len(entries) == 1:
            yield from _trimmed(calls, entries.pop(), end)


def _trimmed(calls: list[Call], entry: Value, end: Value) -> Iterator[Chain]:
    """The chain without the calls at its ends that change nothing."""
    while calls and calls[-1].name in UNCHANGED | DROPOUT:
        calls.pop()
    while calls and calls[0].name in UNCHANGED | DROPOUT and not any(entry in call.inputs for call in calls[1:]):
        entry = calls.pop(0).outputs[0]
    if calls:
        yield Chain(calls, entry, calls[-1].outputs[0], end, is_nonlinear(calls))
