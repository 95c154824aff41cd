"""Find the sites of a model in one recorded forward pass.

From every linear map backwards: through dropouts and BatchNorm to an activation, through it to the linear map (or, in
a gated site, the two) that feeds it. What is found this way either passes every check or is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from shallower.core.text import common_prefix
from shallower.finding.candidates import MOST_STEPS, Found, Walk
from shallower.finding.graph import Graph, Step, Unit, channel_dim, sizes
from shallower.finding.long_sites import long_sites
from shallower.finding.placing import Placing
from shallower.finding.pointwise import (
    ACTIVATIONS,
    AFFINE,
    DROPOUT,
    UNCHANGED,
    activation_name,
    is_pointwise,
    moving,
    obstacle,
    stays_on,
)
from shallower.finding.residuals import with_residuals
from shallower.recording.tracing import Call, Frame, Value
from shallower.sites import Kind, LinearMap, Place, Site, Sites


class Matcher:
    """Turns the candidates of a graph into sites and reasons.

    Attributes:
        not_linear: why the channels that layers make may not become linear, by the name of the layer.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.walk = Walk(graph)
        self.placing = Placing(graph)
        self.not_linear: dict[str, str] = {}

    def sites(self, *, places: bool) -> Sites:
        """All sites and what was skipped."""
        usable: dict[tuple[nn.Module, ...], list[Found]] = {}
        refused: list[tuple[Found, str]] = []
        for found in self.walk.candidates():
            reason = self.obstacle_of(found)
            if reason:
                refused.append((found, reason))
            else:
                usable.setdefault(self.signature(found), []).append(found)
        chosen: list[tuple[list[Found], Place]] = []
        for group in usable.values():
            reason = self.shared_reason(group)
            place: Place | None = None
            if not reason:
                place, reason = self.placing.place_of([found.chain for found in group])
            if place is None or reason:
                refused.append((group[0], reason))
                continue
            chosen.append((group, place))
        last = self.classifiers([group for group, _ in chosen])
        built = [(group, self.build(group, place, i in last)) for i, (group, place) in enumerate(chosen)]
        built += long_sites(self.graph, built)
        built = with_residuals(self.graph, self.placing, built)
        for found, reason in refused:
            self.not_linear.setdefault(self.step_name(found.producer), reason)
            if found.gate is not None:
                self.not_linear.setdefault(self.step_name(found.gate), reason)
        refused.sort(key=lambda item: self.graph.position(item[0].chain[0]))
        items, reasons = self.named(built, refused)
        if places:
            covered = {call for group, site in built if not site.pooled for found in group for call in found.chain}
            items += self.places(covered, reasons)
        items.sort(key=lambda item: item[0])
        model = self.graph.trace.model
        return Sites(
            tuple(site for _, site in items),
            skipped=reasons,
            params=sum(parameter.numel() for parameter in model.parameters()),
            macs=self.graph.trace.macs,
            kv=self.graph.trace.kv,
        )

    def obstacle_of(self, found: Found) -> str:
        """Why a candidate cannot be used, looking at this one execution; "" if it can."""
        maps = [found.producer, *([found.gate] if found.gate else []), *found.consumers]
        for step in maps:
            if isinstance(step, Call):
                weight = next(value for value in step.inputs if value.origin == "parameter")
                return f"the weight {weight.name} is used by {self.graph.title(step)}, not by calling its module"
        units = [step for step in maps if isinstance(step, Unit)]
        for unit in units:
            if unit.problem:
                return unit.problem
        if found.obstacles:
            return found.obstacles[0]
        for call in found.dropouts:
            if stays_on(call):
                return f"the dropout {self.graph.title(call)} stays on in eval mode; give it training=self.training"
        if len(found.norms_before) > 1 or len(found.norms_after) > 1:
            return "there is more than one norm on one side of the activation"
        inside = set(found.inside) | set(found.consumers)
        for value in dict.fromkeys(found.values):
            if value.output:
                return "the hidden tensor is an output of the model"
            if value.clobbered:
                return "the hidden tensor is written in place through a view of it"
            for reader in self.graph.readers(value):
                if reader not in inside:
                    return f"the hidden tensor is also read by {self.graph.title(reader)}"
        producer, consumers = units[0], units[1 + bool(found.gate) :]
        made = [isinstance(unit.module, nn.Conv2d) for unit in units]
        brought = found.averaged or found.pixels is not None
        if len(set(made)) > 1 and not (brought and all(made[: 1 + bool(found.gate)])):
            return "a convolution and a linear layer act on different dimensions"
        if found.pooled or found.pixels is not None:
            met = found.pooled[0] if found.pooled else None
            what = f"the pooling {self.graph.title(met)}" if met else "the reshape to one row of features"
            if not made[0] or found.gate is not None or found.packed:
                return f"{what} stands in between"
            if found.pooled and any(getattr(unit.module, "groups", 1) > 1 for unit in units):
                return f"{what} stands in between, and a grouped convolution on a side of it"
        if found.averaged and not all(taps(consumer.module) == 1 for consumer in consumers):
            return "the average over all pixels is read by a kernel larger than 1x1"
        width = sizes(producer.module)[1] // (2 if found.packed else 1)
        if found.gate is not None and sizes(units[1].module)[1] != width:
            return "the gate and the up projection have different widths"
        for consumer in consumers:
            block = 1 if found.pixels is None else found.pixels[0] * found.pixels[1]
            if sizes(consumer.module)[0] != width * block:
                title = self.graph.title(consumer)
                return f"{title} reads {sizes(consumer.module)[0]} features of a hidden tensor with {width} channels"
        shape = found.joined.shape
        if any(value.shape != shape for value in (found.entry, found.exit)):
            return "the activation changes the shape of the hidden tensor"
        for norm in (*found.norms_before, *found.norms_after):
            dim = 1 if len(norm.source.shape) > 1 else 0
            if dim != channel_dim(producer, len(norm.source.shape)):
                return f"the norm {self.graph.title(norm)} acts on another dimension than the channels"
        return ""

    def signature(self, found: Found) -> tuple[nn.Module, ...]:
        """The modules of a site; executions with the same ones are calls of one site."""
        units = [found.gate, found.producer, *found.norms_before, *found.norms_after, *found.consumers]
        return tuple(unit.module for unit in units if isinstance(unit, Unit))

    def shared_reason(self, group: Sequence[Found]) -> str:
        """Why a site cannot be used because of calls of its modules elsewhere in the model."""
        for role in ("makes", "reads"):
            held: dict[nn.Module, set[Frame]] = {}
            for found in group:
                steps = (
                    [found.producer, found.gate, *found.norms_before]
                    if role == "makes"
                    else found.consumers + found.norms_after
                )
                for unit in steps:
                    if isinstance(unit, Unit):
                        held.setdefault(unit.module, set()).add(unit.frame)
            for module, frames in held.items():
                elsewhere = [frame for frame in self.graph.frames[module] if frame not in frames]
                if elsewhere:
                    caller = elsewhere[0].parent
                    where = f" by {caller.name or type(caller.module).__name__}" if caller is not None else ""
                    return f"{self.graph.names[module][0]} is also called{where} outside of this site"
        return ""

    def build(self, group: Sequence[Found], place: Place, head: bool) -> Site:
        """The site that a group of executions is."""
        first = group[0]
        producer = self.graph.linear_map([found.producer for found in group if isinstance(found.producer, Unit)])
        gate = None
        if first.gate is not None:
            gate = self.graph.linear_map([found.gate for found in group if isinstance(found.gate, Unit)])
        modules = list(dict.fromkeys(unit.module for unit in first.consumers if isinstance(unit, Unit)))
        consumers = tuple(
            self.graph.linear_map(
                [c for found in group for c in found.consumers if isinstance(c, Unit) and c.module is module]
            )
            for module in modules
        )
        if first.pixels is not None:
            consumers = tuple(replace(m, size=first.pixels) for m in consumers)
        dropouts = dict.fromkeys(self.placing.dropout_place(call) for found in group for call in found.dropouts)
        site = Site(
            name="",
            kind=self.kind(first, producer, gate, consumers, head),
            width=producer.d_out // (2 if first.packed else 1),
            producer=producer,
            consumers=consumers,
            activation=place,
            activation_name=activation_name(first.chain, self.placing.owner_of(set(first.chain))),
            gate=gate,
            packed=first.packed,
            norm_before=self.graph.names[first.norms_before[0].module][0] if first.norms_before else "",
            norm_after=self.graph.names[first.norms_after[0].module][0] if first.norms_after else "",
            dropouts=tuple(place for place in dropouts if place is not None),
            calls=len(group),
            channels_first=producer.kind == "conv2d",
            norm_params=sum(norm_params(norm) for norm in (*first.norms_before, *first.norms_after)),
            not_merged=self.not_merged(first),
            averaged=first.averaged,
            pooled=", ".join(call.name for call in first.pooled),
            not_linear=self.pooling(first),
            not_narrow=not_narrow(producer, consumers),
        )
        return self.with_params(site, group)

    def with_params(self, site: Site, group: Sequence[Found]) -> Site:
        """The site with the parameters of an activation that is a module (those of a PReLU), and who else uses it."""
        owner = self.placing.owner_of(set(group[0].chain))
        if owner is None:
            return site
        params = sum(parameter.numel() for parameter in owner.module.parameters())
        names, calls = self.graph.names[owner.module], len(self.graph.frames[owner.module])
        if params == 0:
            return site
        return replace(
            site,
            activation_params=params,
            activation_shared=calls > len(group) or len(names) > 1,
            activation_origin=names[0],
            activation_calls=calls,
        )

    def kind(
        self, first: Found, producer: LinearMap, gate: LinearMap | None, consumers: Sequence[LinearMap], head: bool
    ) -> Kind:
        """What the site is in the network, from the structure around it."""
        if gate is not None or first.packed:
            return "gated"
        if isinstance(first.producer, Unit) and not first.producer.source.fed:
            return "position MLP"
        maps = (producer, *consumers)
        plain = all((m.taps, m.groups, m.stride, m.padding) == (1, 1, (1, 1), (0, 0)) for m in maps)
        widening = producer.d_out > max(producer.d_in, *(c.d_out for c in consumers))
        if producer.kind == "conv2d" and not (plain and widening):
            return "convolution"
        return "head" if head else "feed-forward"

    def classifiers(self, groups: Sequence[Sequence[Found]]) -> set[int]:
        """Which groups are heads of the network: in no residual, and no maps but heads behind them."""
        followed: set[Value] = set()
        for call in reversed(self.graph.trace.calls):
            if self.graph.is_map(self.graph.step(call)) or any(value in followed for value in call.outputs):
                followed.update(call.inputs)
        by_producer = {group[0].producer: i for i, group in enumerate(groups)}
        last: set[int] = set()
        for i in reversed(range(len(groups))):
            results = [unit.result for found in groups[i] for unit in found.consumers if isinstance(unit, Unit)]
            if any(self.joins_residual(value) for value in results):
                continue
            next_sites = [by_producer.get(consumer) for consumer in groups[i][0].consumers]
            if not any(value in followed for value in results) or (next_sites and all(n in last for n in next_sites)):
                last.add(i)
        return last

    def joins_residual(self, value: Value) -> bool:
        """Whether a value is soon added to another tensor that depends on the inputs."""
        waiting, seen = [(value, 0)], {value}
        while waiting:
            current, depth = waiting.pop()
            for reader in self.graph.readers(current):
                if isinstance(reader, Unit):
                    onward = [reader.result] if reader.kind == "norm" else []
                elif reader.name in ("add", "sub") and len([v for v in reader.inputs if v.fed and v.elements > 1]) > 1:
                    return True
                elif reader.name in UNCHANGED | DROPOUT | AFFINE or obstacle(reader):
                    onward = reader.outputs
                else:
                    onward = []
                if depth < 8:
                    waiting += [(v, depth + 1) for v in onward if v not in seen]
                    seen.update(onward)
        return False

    def pooling(self, found: Found) -> str:
        """Why an activation in front of a pooling is not a matter of the site, "" where there is no pooling."""
        if not found.pooled:
            return ""
        return (
            f"the pooling {self.graph.title(found.pooled[0])} stands between; the activation alone can go, as a place "
            '(find_sites with kinds="activation")'
        )

    def not_merged(self, found: Found) -> str:
        """Why two maps cannot be composed, "" if they can (zero padding between convolutions is the plan's affair)."""
        if found.averaged:
            return "the average over all pixels stands between producer and consumers"
        if found.pooled:
            return f"the pooling {self.graph.title(found.pooled[0])} stands between producer and consumers"
        for unit in (found.producer, *found.consumers):
            if isinstance(unit, Unit) and isinstance(unit.module, nn.Conv2d) and unit.module.padding_mode != "zeros":
                return f"{unit.frame.name} pads with {unit.module.padding_mode}, not zeros"
        return ""

    def named(
        self, built: list[tuple[list[Found], Site]], refused: list[tuple[Found, str]]
    ) -> tuple[list[tuple[int, Site]], dict[str, str]]:
        """The sites with their names and their position in the execution, and the skipped ones by name."""
        prefixes = [self.prefix(found[0]) for found, site in built if not site.between]
        prefixes += [self.prefix(found) for found, _ in refused]
        short = [site for _, site in built if not site.between]
        items = []
        taken: set[str] = set()
        for group, site in built:
            prefix = common_prefix([m.name for m in site.maps])
            if site.between:
                within = [s for s in short if {m.name for m in s.maps} <= {m.name for m in site.maps}]
                others = prefixes.count(prefix) - sum(prefix == common_prefix([m.name for m in s.maps]) for s in within)
                lone = others == 0 and prefix not in taken
                name = prefix if prefix and lone else f"{site.maps[0].name}...{site.consumers[0].name}"
            else:
                lone = prefixes.count(prefix) == 1
                name = prefix if prefix and lone else site.maps[-len(site.consumers) - 1].name
            taken.add(name)
            items.append((self.graph.position(group[0].chain[0]), replace(site, name=name)))
        skipped: dict[str, str] = {}
        for (found, reason), prefix in zip(refused, prefixes[len(short) :], strict=True):
            name = prefix if prefix and prefixes.count(prefix) == 1 else self.step_name(found.producer)
            if name not in taken:
                skipped.setdefault(name, reason)
        items.sort(key=lambda item: item[0])
        return items, skipped

    def step_name(self, step: Step) -> str:
        """A name for a producer, whatever it is."""
        if isinstance(step, Unit):
            return step.frame.name or type(step.module).__name__
        weight = next((value.name for value in step.inputs if value.origin == "parameter" and len(value.shape) > 1), "")
        return weight.rsplit(".", 1)[0] if "." in weight else weight or step.name

    def prefix(self, found: Found) -> str:
        """The common dotted prefix of a site's maps."""
        steps = [step for step in (found.gate, found.producer, *found.consumers) if step is not None]
        return common_prefix([self.step_name(step) for step in steps])

    def places(self, covered: set[Call], skipped: dict[str, str]) -> list[tuple[int, Site]]:
        """The activations that stand in no site, with their position; those that cannot be exchanged are skipped."""
        groups: dict[Any, list[Found]] = {}
        for chain, entry, top in self.activations():
            if covered & set(chain):
                continue
            frame = self.placing.frame_of(set(chain))
            key = (frame.module, tuple((c.name, c.ordinal, c.frame.module, c.frame.ordinal) for c in chain))
            dummy = chain[0]
            groups.setdefault(key, []).append(Found(top, chain, entry, top, dummy))
        items = []
        for group in groups.values():
            first = group[0]
            place, reason = self.placing.place_of([found.chain for found in group])
            owner = self.placing.owner_of(set(first.chain))
            if place is None:
                frame = self.placing.frame_of(set(first.chain))
                skipped.setdefault(f"{frame.name or 'model'}:{first.chain[0].name}#{first.chain[0].ordinal}", reason)
                continue
            site = Site(
                name=str(place),
                kind="activation",
                width=0,
                producer=None,
                consumers=(),
                activation=place,
                activation_name=activation_name(first.chain, owner),
                norm_before=self.norm_before([found.entry for found in group]),
                calls=len(group),
                channels_first=self.is_spatial(first.entry),
            )
            items.append((self.graph.position(first.chain[0]), self.with_params(site, group)))
        return items

    def norm_before(self, entries: Sequence[Value]) -> str:
        """The BatchNorm whose output these values are, "" where it is none or not the same for all."""
        norms: set[str] = set()
        for value in entries:
            step = self.graph.source(value)
            while isinstance(step, Call) and step.name in UNCHANGED and step.inputs:
                step = self.graph.source(step.inputs[0])
            usable = isinstance(step, Unit) and step.kind == "norm" and not step.problem
            norms.add(self.graph.names[step.module][0] if isinstance(step, Unit) and usable else "")
        return norms.pop() if len(norms) == 1 else ""

    def activations(self) -> Iterator[tuple[list[Call], Value, Value]]:
        """Every activation: its calls, the value it reads and the value it gives."""
        roots: dict[Value, Value] = {}
        for call in self.graph.trace.calls:
            if call in self.graph.unit_of or not is_pointwise(call) or not call.outputs:
                continue
            found = {roots.get(value, value) for value in moving(call)}
            if len(found) == 1:
                roots[call.outputs[0]] = found.pop()
        ends = {
            value
            for value, root in roots.items()
            if any(roots.get(o) is not root for reader in value.readers for o in reader.outputs or [value])
            or not value.readers
        }
        for end in sorted(ends, key=lambda value: self.graph.position(value.call) if value.call else 0):
            chain: list[Call] = []
            entries: set[Value] = set()
            waiting = [end]
            while waiting:
                value = waiting.pop()
                if value.call is None or (value is not end and value in ends) or value not in roots:
                    entries.add(value)
                elif value.call not in chain:
                    chain.append(value.call)
                    waiting += moving(value.call)
            chain.sort(key=self.graph.position)
            if len(entries) != 1 or not any(call.name in ACTIVATIONS for call in chain):
                continue
            entry = entries.pop()
            chain, entry, _ = self.walk.trimmed(chain, entry)
            while chain[-1].name in UNCHANGED | DROPOUT:
                chain.pop()
            onward = [reader for reader in end.readers if reader.outputs]
            gates = onward and all(r.name in ("mul", "glu") and len(moving(r)) > 1 for r in onward)
            if entry.fed and entry.elements > 1 and not gates:
                yield chain, entry, chain[-1].outputs[0]

    def is_spatial(self, value: Value) -> bool:
        """Whether a value has its channels in dimension 1, as convolutions make it."""
        waiting, seen = [value], {value}
        while waiting and len(seen) < MOST_STEPS:
            current = waiting.pop(0)
            step = self.graph.source(current)
            if isinstance(step, Unit) and step.kind == "map":
                return isinstance(step.module, nn.modules.conv._ConvNd)
            onward = [step.source] if isinstance(step, Unit) else step.inputs if step is not None else []
            waiting += [v for v in onward if v not in seen and v.fed]
            seen.update(onward)
        return False


def taps(module: nn.Module) -> int:
    """Kernel positions of a map."""
    return module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1


def norm_params(norm: Unit) -> int:
    """Parameters that a norm has for each channel."""
    return sum(parameter is not None for parameter in norm.module._parameters.values())


def not_narrow(producer: LinearMap, consumers: Sequence[LinearMap]) -> str:
    """Why channels cannot be kept and dropped one by one, "" if they can."""
    for m in (producer, *consumers):
        if m.groups > 1:
            how = "depthwise" if m.groups == m.d_in == m.d_out else "grouped"
            return f"{m.name} is a {how} convolution, which ties the channels on its two sides together"
    return ""
