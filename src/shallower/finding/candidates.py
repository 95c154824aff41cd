"""Candidates for sites: from every linear map backwards to an activation and to the maps that feed it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shallower.finding.graph import Graph, Step, Unit, channel_dim
from shallower.finding.pointwise import (
    DROPOUT,
    UNCHANGED,
    averages_all,
    describe,
    flattens,
    flattens_one_pixel,
    half,
    is_nonlinear,
    is_pointwise,
    moving,
    obstacle,
    pools,
    writes_out_features,
)
from shallower.recording.tracing import Call, Value

MOST_STEPS = 64
"""Pointwise steps that are followed backwards before giving up."""


@dataclass(eq=False)
class Found:
    """One execution of a site, as found by walking backwards.

    Attributes:
        joined: the value at which the activation (or the gate's product) is done.
        chain: the calls that are the activation, in order of execution.
        entry, exit: the value the activation reads and the value it gives.
        producer: the map (the up projection of a gated site), or a call that acts as one.
        gate: the gate's map, where separate.
        packed: which half comes first, where the gate is packed.
        inside: the steps between producer and consumers, consumers excluded.
        values: the values between, which nothing else may read.
        norms_before, norms_after, dropouts: steps met on the way.
        consumers: the maps that read it.
        averaged: the consumers read the average over all pixels.
        pooled: the calls that pool or resize the image, consumers last.
        pixels: height and width of the image that is flattened for the consumers, None where none is.
        obstacles: why it cannot be used, first reason first.
    """

    joined: Value
    chain: list[Call]
    entry: Value
    exit: Value
    producer: Step
    gate: Step | None = None
    packed: Literal["", "gate-first", "up-first"] = ""
    inside: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    norms_before: list[Unit] = field(default_factory=list)
    norms_after: list[Unit] = field(default_factory=list)
    dropouts: list[Call] = field(default_factory=list)
    consumers: list[Step] = field(default_factory=list)
    averaged: bool = False
    pooled: list[Call] = field(default_factory=list)
    pixels: tuple[int, int] | None = None
    obstacles: list[str] = field(default_factory=list)


class Walk:
    """The search for candidates in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def candidates(self) -> list[Found]:
        """All candidates, those with several consumers joined, in order of execution."""
        by_value: dict[Value, Found] = {}
        for call in self.graph.trace.calls:
            step = self.graph.step(call)
            if not self.graph.is_map(step):
                continue
            if isinstance(step, Unit):
                if call is not next(step.frame.calls()):
                    continue
                read = [step.source]
            else:
                read = [value for value in step.inputs if value.dynamic]
            for found in (f for value in read[:1] for f in self.behind(step, value)):
                known = by_value.get(found.joined)
                if known is None:
                    by_value[found.joined] = found
                    continue
                if known.averaged != found.averaged:
                    known.obstacles.append(
                        "its average over all pixels and its pixels are both read (squeeze and excitation?)"
                    )
                if [c.name for c in known.pooled] != [c.name for c in found.pooled] or known.pixels != found.pixels:
                    known.obstacles.append("its consumers read it through different poolings")
                if known.norms_after != found.norms_after:
                    known.obstacles.append("its consumers read it through different norms")
                known.consumers += found.consumers
                known.values += found.values
                known.inside += found.inside
                known.dropouts += [d for d in found.dropouts if d not in known.dropouts]
                known.obstacles += [o for o in found.obstacles if o not in known.obstacles]
        order = {id(found): self.graph.position(found.joined.call) for found in by_value.values() if found.joined.call}
        return sorted(by_value.values(), key=lambda found: order[id(found)])

    def behind(self, consumer: Step, read: Value) -> Iterator[Found]:
        """What a linear map's input looks like going back: sites, usable or not."""
        joined, after, obstacles = self.back(read, averaging=True)
        top = self.graph.source(joined)
        if isinstance(top, Call) and top.name in ("cat", "concat", "concatenate"):
            for part in [value for value in top.inputs if value.fed][:8]:
                found = self.candidate(consumer, part, part)
                if found is not None:
                    found.obstacles.insert(0, f"it is concatenated with other tensors by {self.graph.title(top)}")
                    yield found
            return
        found = self.candidate(consumer, read, joined, after, obstacles)
        if found is not None:
            yield found

    def candidate(
        self,
        consumer: Step,
        read: Value,
        joined: Value,
        after: Sequence[Step] = (),
        obstacles: Sequence[str] = (),
    ) -> Found | None:
        """The one site that ends at `joined`, from which a linear map reads after some steps."""
        after, obstacles = list(after), list(obstacles)
        mixed: list[Value] = []
        for _ in range(3):
            calls, leaves, between = self.cone(joined)
            if not calls:
                top = self.graph.source(joined)
                if isinstance(top, Call) and top.name == "glu":
                    return self.one_function_gate(joined, top, after, obstacles, consumer)
                return None
            live = [leaf for leaf in leaves if leaf.dynamic]
            still = [leaf for leaf in leaves if not leaf.dynamic]
            if still and live:
                obstacles.append(f"a tensor with more than one element ({describe(still[0])}) is mixed in")
            if len(live) == 1:
                found = self.plain(joined, calls, between, live[0], obstacles)
                break
            top = self.graph.source(joined)
            if len(live) < 2 or not isinstance(top, Call):
                return None
            gated = self.gated(joined, top, obstacles)
            if gated is not None:
                found = gated
                break
            # Something else is multiplied in or mixed in after the activation: go on along the side that has one.
            same = [side for side in moving(top) if side.shape == top.outputs[0].shape]
            sides = [side for side in same if is_nonlinear(self.cone(self.back(side)[0])[0])][:1]
            others = [side for side in moving(top) if side not in sides]
            if not sides or not others or (top.name in ("add", "sub") and others[0].origin == "computed"):
                return None
            obstacles.append(f"another tensor ({describe(others[0])}) is mixed in by {self.graph.title(top)}")
            joined, more, met = self.back(sides[0])
            after += [top, *more]
            obstacles += met
            mixed.append(sides[0])
        else:
            return None
        if found is None:
            return None
        found.inside += after
        found.values += [read, *mixed]
        for step in after:
            found.values += [step.source] if isinstance(step, Unit) else moving(step)
            if isinstance(step, Call):
                found.averaged |= averages_all(step)
                found.pixels = flattens(step) or found.pixels
                if pools(step) and not averages_all(step):
                    found.pooled.insert(0, step)
            if isinstance(step, Unit) and not step.problem:
                found.norms_after.append(step)
            if isinstance(step, Call) and step.name in DROPOUT:
                found.dropouts.append(step)
        found.consumers.append(consumer)
        if found.averaged:
            found.pixels = None
        return found

    def back(self, value: Value, averaging: bool = False) -> tuple[Value, list[Step], list[str]]:
        """Back through what changes nothing, BatchNorm, and (as obstacles) other norms, reshapes and pooling.

        With `averaging`, what pools or flattens an image is no obstacle.

        Returns the value reached, the steps passed (latest first) and the obstacles among them.
        """
        passed: list[Step] = []
        obstacles: list[str] = []
        while len(passed) < MOST_STEPS:
            step = self.graph.source(value)
            plain = averaging and isinstance(step, Call) and pools(step)
            if value in self.graph.opaque and not isinstance(step, Unit) and not plain:
                frame, value = self.graph.opaque[value]
                obstacles.append(f"{self.graph.title(frame)} reads the hidden tensor as a whole and stands in between")
                passed += list(dict.fromkeys(self.graph.step(call) for call in frame.calls()))
            elif isinstance(step, Unit) and step.kind == "norm":
                if step.problem:
                    obstacles.append(step.problem)
                passed.append(step)
                value = step.source
            elif (
                isinstance(step, Call)
                and step.inputs
                and (step.name in UNCHANGED | DROPOUT or (averaging and _keeps_channels(step)))
            ):
                if averaging and flattens(step) and not flattens_one_pixel(step) and writes_out_features(step):
                    obstacles.append(
                        f"the reshape {self.graph.title(step)} says how many features there are; flatten(1) would not"
                    )
                passed.append(step)
                value = step.inputs[0]
            elif isinstance(step, Call) and (what := obstacle(step)):
                obstacles.append(f"{what} {self.graph.title(step)} stands in between")
                passed.append(step)
                value = step.inputs[0]
            else:
                return value, passed, obstacles
            if len(obstacles) > 3:
                break
        return value, passed, obstacles

    def cone(self, value: Value) -> tuple[list[Call], list[Value], list[Value]]:
        """Pointwise calls that `value` is made by, in order of execution; the values they start from; all between."""
        calls: list[Call] = []
        leaves: list[Value] = []
        between: list[Value] = []
        waiting = [value]
        seen: set[Value] = set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            step = self.graph.source(current)
            if isinstance(step, Call) and is_pointwise(step) and len(calls) < MOST_STEPS:
                between.append(current)
                if step not in calls:
                    calls.append(step)
                waiting += moving(step)
            else:
                leaves.append(current)
        calls.sort(key=self.graph.position)
        return calls, leaves, between

    def plain(
        self, joined: Value, calls: list[Call], between: list[Value], leaf: Value, obstacles: list[str]
    ) -> Found | None:
        """An activation with one input."""
        if not is_nonlinear(calls):
            return None
        start, before, met = self.back(leaf)
        producer = self.graph.source(start)
        if producer is None or not self.graph.is_map(producer):
            return None
        chain, entry, trimmed = self.trimmed(calls, leaf)
        found = Found(joined, chain, entry, joined, producer, obstacles=obstacles + met)
        self._collect(found, chain, [*between, leaf], [*trimmed, *before], start)
        return found

    def trimmed(self, calls: list[Call], leaf: Value) -> tuple[list[Call], Value, list[Step]]:
        """A chain without the calls at its beginning that change nothing, the value it then starts from, and those."""
        chain, passed = list(calls), []
        while chain[0].name in UNCHANGED | DROPOUT and not any(leaf in call.inputs for call in chain[1:]):
            leaf = chain[0].outputs[0]
            passed.append(chain.pop(0))
        return chain, leaf, list(passed)

    def gated(self, joined: Value, top: Call, obstacles: list[str]) -> Found | None:
        """f(G x) * (U x), with two maps or with one whose result is split."""
        factors = moving(top)
        if top.name != "mul" or len(factors) != 2:
            return None
        cones = [self.cone(factor) for factor in factors]
        active = [is_nonlinear(calls) for calls, _, _ in cones]
        if sum(active) == 0 or any(len([leaf for leaf in leaves if leaf.dynamic]) != 1 for _, leaves, _ in cones):
            return None
        f, other = (0, 1) if active[0] else (1, 0)
        chain, f_leaves, f_between = cones[f]
        steps, u_leaves, u_between = cones[other]
        gate_leaf = next(leaf for leaf in f_leaves if leaf.dynamic)
        up_leaf = next(leaf for leaf in u_leaves if leaf.dynamic)
        met: list[str] = []
        if all(active):
            met.append("both factors of the product are activated")
        elif any(call.name not in UNCHANGED for call in steps):
            met.append("the factor without activation is scaled or shifted")
        chain, entry, trimmed = self.trimmed(chain, gate_leaf)
        steps = [*steps, *(step for step in trimmed if isinstance(step, Call))]
        found = self._packed(joined, chain, gate_leaf, up_leaf, obstacles + met, factors[f])
        if found is None:
            gate_start, gate_before, gate_met = self.back(gate_leaf)
            up_start, up_before, up_met = self.back(up_leaf)
            gate, up = self.graph.source(gate_start), self.graph.source(up_start)
            if gate is None or up is None or not (self.graph.is_map(gate) and self.graph.is_map(up)):
                return None
            if factors[0].shape != factors[1].shape:
                return None
            found = Found(
                joined, chain, gate_leaf, factors[f], up, gate=gate, obstacles=obstacles + met + gate_met + up_met
            )
            if isinstance(gate, Unit) and isinstance(up, Unit) and gate.source is not up.source:
                found.obstacles.append("the gate and the up projection read different tensors")
            self._collect(found, [], [gate_leaf], gate_before, gate_start)
            self._collect(found, [], [up_leaf], up_before, up_start)
        found.entry = entry
        found.dropouts += [call for call in (*chain, *steps) if call.name in DROPOUT]
        if found.norms_before:
            found.obstacles.append(
                f"a norm ({self.graph.title(found.norms_before[0])}) stands before the gate's product"
            )
        found.inside += [top, *chain, *steps]
        found.values += [joined, *factors, *f_between, *u_between]
        return found

    def _packed(
        self, joined: Value, chain: list[Call], gate: Value, up: Value, obstacles: list[str], exit: Value
    ) -> Found | None:
        gate_half, up_half = half(gate), half(up)
        if gate_half is None or up_half is None or gate_half[0] is not up_half[0]:
            return None
        base, gate_index, dim = gate_half
        _, up_index, up_dim = up_half
        start, before, met = self.back(base)
        producer = self.graph.source(start)
        if producer is None or not self.graph.is_map(producer):
            return None
        found = Found(joined, chain, gate, exit, producer, obstacles=obstacles + met)
        found.packed = "gate-first" if gate_index == 0 else "up-first"
        cut = gate.call if gate.call is not None else up.call
        if cut is not None and cut.name not in ("chunk", "unsafe_chunk", "tensor_split"):
            found.obstacles.append(
                f"{self.graph.title(cut)} cuts gate and up projection apart at a place that may be fixed; use chunk(2)"
            )
        if {gate_index, up_index} != {0, 1} or dim != up_dim:
            found.obstacles.append("the gate and the up projection are interleaved in one tensor")
        elif dim != channel_dim(producer, len(base.shape)):
            found.obstacles.append("the hidden tensor is split along another dimension than its channels")
        self._collect(found, [], [base, gate, up], before, start)
        found.inside += [step for value in (gate, up) if (step := self.graph.source(value)) is not None]
        return found

    def one_function_gate(
        self, joined: Value, top: Call, after: list[Step], obstacles: list[str], consumer: Step
    ) -> Found | None:
        """F.glu: sigmoid and product in one function."""
        start, _, _ = self.back(top.inputs[0])
        producer = self.graph.source(start)
        if producer is None or not self.graph.is_map(producer):
            return None
        found = Found(joined, [top], start, joined, producer, inside=[top, *after], consumers=[consumer])
        found.obstacles = ["gate and product are one function (glu)", *obstacles]
        return found

    def _collect(
        self, found: Found, calls: Sequence[Call], values: Iterable[Value], before: list[Step], start: Value
    ) -> None:
        found.inside += [*calls, *before]
        found.values += [*values, start]
        for step in before:
            found.values += [step.source] if isinstance(step, Unit) else moving(step)
            if isinstance(step, Unit) and not step.problem:
                found.norms_before.append(step)
            if isinstance(step, Call) and step.name in DROPOUT:
                found.dropouts.append(step)
        found.dropouts += [call for call in calls if call.name in DROPOUT]


def _keeps_channels(call: Call) -> bool:
    """Whether a call pools or flattens an image, and nothing of one channel goes into another."""
    return averages_all(call) or flattens_one_pixel(call) or pools(call) or flattens(call) is not None
