"""From a linear map through one activation to the maps that read it: what may become linear, or why it may not.

passage = Passages(ways).of(map)        # None where no activation and no other map is behind it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import nn

from shallower.finding.linear.units import Graph, Step, Unit, channel_dim, sizes, weight_of
from shallower.finding.linear.ways import Chain, Hidden, Passed, Way, Ways
from shallower.finding.pointwise import DROPOUT, UNCHANGED, averages_all, describe, flattens, moving, pools, stays_on
from shallower.recording.tracing import Call, Value

CUTTING = ("chunk", "unsafe_chunk", "tensor_split")
"""Calls whose halves are halves of fewer channels, too."""


@dataclass(eq=False)
class Passage:
    """One execution of a site.

    Attributes:
        producer: the map whose channels pass (the up projection of a gated site), usable or not.
        gate: the gate's map, where it is another one.
        packed: which half comes first, where one map makes gate and up projection.
        steps: what the channels pass, in order, consumers excluded.
        chain: the activation among them; None where there is none.
        consumers: the maps that read them.
        dropouts: on the ways to all of them.
        reason: why they may not become linear, "" where they may.
    """

    producer: Step
    gate: Step | None
    packed: Literal["", "gate-first", "up-first"]
    steps: tuple[Passed, ...]
    chain: Chain | None
    consumers: list[Step]
    dropouts: list[Call] = field(default_factory=list)
    reason: str = ""

    @property
    def makers(self) -> list[Step]:
        """The maps that make the channels: the gate, where it is another one, and the producer."""
        return [self.producer] if self.gate is None else [self.gate, self.producer]

    @property
    def maps(self) -> list[Step]:
        """All maps, in the order in which they run."""
        return [*self.makers, *self.consumers]

    def norms(self, *, after: bool) -> list[Unit]:
        """The norms before or after the activation; where there is none, all are before it."""
        at = self.steps.index(self.chain) if self.chain is not None else len(self.steps)
        steps = self.steps[at:] if after else self.steps[:at]
        return [step for step in steps if isinstance(step, Unit)]

    @cached_property
    def images(self) -> list[Call]:
        """The calls that pool, resize or flatten an image."""
        calls = [step for step in self.steps if isinstance(step, Call)]
        return [call for call in calls if pools(call) or averages_all(call) or flattens(call)]

    @property
    def averaged(self) -> bool:
        """Whether consumers read the average over all pixels."""
        return any(map(averages_all, self.images))

    @property
    def pooled(self) -> list[Call]:
        """The calls that pool or resize, where not all pixels are averaged."""
        return [call for call in self.images if pools(call) and not averages_all(call)]

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Height and width of the image that is flattened for the consumers, None where none is."""
        found = [size for size in map(flattens, self.images) if size]
        return found[-1] if found and not self.averaged else None

    @property
    def form(self) -> tuple[object, ...]:
        """What has to be the same on the ways to all consumers."""
        return self.chain, self.norms(after=True), [call.name for call in self.pooled], self.pixels


class Passages:
    """The passages of a followed pass."""

    def __init__(self, ways: Ways) -> None:
        self.graph: Graph = ways.graph
        self.ways = ways
        self._owners: dict[Value, list[Hidden]] = {}
        for hidden in ways.all.values():
            for value in hidden.ways:
                self._owners.setdefault(value, []).append(hidden)

    def of(self, root: Step) -> Passage | None:
        """What the channels of a map pass on the way to others; None where nothing reads them, or where they gate."""
        hidden = self.ways.all[root]
        found: list[Passage] = []
        for consumer, way in hidden.ends:
            one = self._one(hidden, consumer, way)
            if one is not None:
                found.append(one)
        active = [one for one in found if one.chain is not None] or found
        if not active:
            return None
        passage = active[0]
        passage.consumers = [one.consumers[0] for one in active]
        passage.dropouts = list(dict.fromkeys(call for one in active for call in one.dropouts))
        passage.reason = self._reason(passage, active)
        return passage

    def _one(self, hidden: Hidden, consumer: Step, way: Way) -> Passage | None:
        """The passage to one consumer, with what is known of it alone."""
        passage = Passage(hidden.root, None, "", way.steps, None, [consumer], reason=way.reason)
        product = next((step for step in way.steps if step in hidden.products), None)
        if isinstance(product, Call) and not self._gate(passage, hidden, product):
            return None
        chains = [step for step in passage.steps if isinstance(step, Chain)]
        passage.chain = next((chain for chain in chains if chain.active), None)
        calls = [step for step in passage.steps if isinstance(step, Call)]
        if passage.chain is not None:
            calls += passage.chain.calls
        passage.dropouts = [call for call in calls if call.name in DROPOUT]
        if len(chains) > (passage.chain is not None):
            passage.reason = passage.reason or "it is scaled, shifted or activated in several places"
        return passage

    def _gate(self, passage: Passage, hidden: Hidden, product: Call) -> bool:
        """Add what makes the other factor of a product to a passage; whether the passage is one of its own."""
        factors = moving(product)
        sides: list[tuple[Hidden, Way]] = []
        for factor in factors:
            owners = self._owners.get(factor, [])
            if len(owners) == 1:
                sides.append((owners[0], owners[0].ways[factor]))
        own = [factor for factor in factors if factor in hidden.ways]
        if len(sides) < 2 or factors[0].shape != factors[1].shape:
            other = next((factor for factor in factors if factor not in own), factors[1])
            what = f"another tensor ({describe(other)}) is mixed in by {self.graph.title(product)}"
            passage.reason = passage.reason or what
            return hidden.ways[own[0]].active
        active = [way.active for _, way in sides]
        if not any(active):
            return False
        (gate, gate_way), (up, up_way) = sides if active[0] else sides[::-1]
        if up is not hidden:
            return False
        reasons = [passage.reason, gate_way.reason, up_way.reason]
        if all(active):
            reasons.append("both factors of the product are activated")
        if any(isinstance(step, Chain) for step in up_way.steps):
            reasons.append("the factor without activation is scaled or shifted")
        norm = next((step for step in (*gate_way.steps, *up_way.steps) if isinstance(step, Unit)), None)
        if norm is not None:
            reasons.append(f"a norm ({self.graph.title(norm)}) stands before the gate's product")
        if gate is hidden:
            passage.packed = "gate-first" if gate_way.half == 0 else "up-first"
            reasons.append(self._against_halves(gate_way, up_way))
        else:
            passage.gate = gate.root
            passage.steps = tuple(dict.fromkeys((*gate_way.steps, *passage.steps)))
            if isinstance(gate.root, Unit) and isinstance(up.root, Unit) and gate.root.source is not up.root.source:
                reasons.append("the gate and the up projection read different tensors")
        passage.reason = next(filter(None, reasons), "")
        return True

    def _against_halves(self, gate: Way, up: Way) -> str:
        """Why gate and up projection are no two halves of a map's rows; "" where they are."""
        cuts = [step for step in (*gate.steps, *up.steps) if isinstance(step, Call)]
        fixed = [cut for cut in cuts if cut.name not in (*CUTTING, *DROPOUT, *UNCHANGED)]
        if {gate.half, up.half} != {0, 1}:
            return "the gate and the up projection are interleaved in one tensor"
        if fixed:
            title = self.graph.title(fixed[0])
            return f"{title} cuts gate and up projection apart at a place that may be fixed; use chunk(2)"
        return ""

    # ------------------------------------------------------------------------------------------------------ reasons

    def _reason(self, passage: Passage, parts: Sequence[Passage]) -> str:
        """Why the channels may not become linear, looking at this one execution; "" where they may."""
        for step in passage.maps:
            if isinstance(step, Call):
                weight = weight_of(step)
                name = weight.name if weight is not None else ""
                return f"the weight {name} is used by {self.graph.title(step)}, not by calling its module"
        for step in passage.maps:
            if isinstance(step, Unit) and step.problem:
                return step.problem
        reasons = [parts[0].reason, self._against_several(parts), *(part.reason for part in parts)]
        if any(reasons):
            return next(filter(None, reasons))
        for call in passage.dropouts:
            if stays_on(call):
                return f"the dropout {self.graph.title(call)} stays on in eval mode; give it training=self.training"
        if max(len(passage.norms(after=False)), len(passage.norms(after=True))) > 1:
            return "there is more than one norm on one side of the activation"
        return self._against_reading(passage, parts) or self._against_shape(passage)

    def _against_several(self, parts: Sequence[Passage]) -> str:
        """Why several maps are no consumers of one site."""
        if len({part.averaged for part in parts}) > 1:
            return "its average over all pixels and its pixels are both read (squeeze and excitation?)"
        for part in parts[1:]:
            if part.chain is not parts[0].chain:
                return f"the hidden tensor is also read by {self.graph.title(part.consumers[0])}"
            if part.form != parts[0].form:
                return "its consumers read it through different norms or poolings"
        return ""

    def _against_reading(self, passage: Passage, parts: Sequence[Passage]) -> str:
        """What else reads the channels, or that they leave the model."""
        expected: set[Passed] = {*passage.consumers, *(step for part in parts for step in part.steps)}
        for one in map(self.ways.all.__getitem__, passage.makers):
            values = [value for value, way in one.ways.items() if not way.reason]
            if any(value.output for value in values):
                return "the hidden tensor is an output of the model"
            if any(value.clobbered for value in values):
                return "the hidden tensor is written in place through a view of it"
            for step in one.readers:
                if step not in expected:
                    reader = step.calls[0] if isinstance(step, Chain) else step
                    return f"the hidden tensor is also read by {self.graph.title(reader)}"
        return ""

    def _against_shape(self, passage: Passage) -> str:
        """Whether channels stand in one dimension, each with its row and its columns."""
        units = [step for step in passage.maps if isinstance(step, Unit)]
        makers = units[: len(passage.makers)]
        consumers, width = units[len(makers) :], sizes(makers[-1].module)[1] // (2 if passage.packed else 1)
        images = [isinstance(unit.module, nn.Conv2d) for unit in units]
        if len(set(images)) > 1 and not passage.averaged and passage.pixels is None:
            return "a convolution and a linear layer act on different dimensions"
        if passage.pooled and any(getattr(unit.module, "groups", 1) > 1 for unit in units):
            title = self.graph.title(passage.pooled[0])
            return f"the pooling {title} stands in between, and a grouped convolution on a side of it"
        if passage.averaged and any(taps(consumer.module) > 1 for consumer in consumers):
            return "the average over all pixels is read by a kernel larger than 1x1"
        if any(sizes(maker.module)[1] != sizes(makers[-1].module)[1] for maker in makers):
            return "the gate and the up projection have different widths"
        height, long = passage.pixels or (1, 1)
        for consumer in consumers:
            if sizes(consumer.module)[0] != width * height * long:
                title = self.graph.title(consumer)
                return f"{title} reads {sizes(consumer.module)[0]} features of a hidden tensor with {width} channels"
        if passage.chain is not None and passage.chain.entry.shape != passage.chain.exit.shape:
            return "the activation changes the shape of the hidden tensor"
        for norm in (*passage.norms(after=False), *passage.norms(after=True)):
            dims = len(norm.source.shape)
            if channel_dim(makers[-1], dims) != min(1, dims - 1):
                return f"the norm {self.graph.title(norm)} acts on another dimension than the channels"
        return ""


def taps(module: nn.Module) -> int:
    """Kernel positions of a map."""
    return module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
