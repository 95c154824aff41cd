"""The sites of a pass whose channels may become linear, and why those of other layers may not.

found = Describer(followed).sites(places=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from shallower.core.text import common_prefix
from shallower.finding.channels.following import Following
from shallower.finding.linear.passages import Passage, Passages
from shallower.finding.linear.placing import Placing
from shallower.finding.linear.units import Graph, Step, Unit, made_by
from shallower.finding.linear.ways import Chain, Ways
from shallower.finding.pointwise import ACTIVATIONS, DROPOUT, UNCHANGED, activation_name, moving
from shallower.recording.tracing import Call, Frame, Value
from shallower.sites import Between, Kind, LinearMap, Place, Residual, Site, Sites

FARTHEST = 64
"""Values that are looked at on the way back to a map."""

Built = tuple[list[Passage], Site]
"""The executions of a site, and the site."""


class Describer:
    """Describes what stands between linear maps as sites.

    Attributes:
        not_linear: why the channels that layers make may not become linear, by the name of the layer.
    """

    def __init__(self, f: Following) -> None:
        self.graph = Graph(f.trace)
        self.ways = Ways(f, self.graph)
        self.placing = Placing(self.graph)
        self.not_linear: dict[str, str] = {}

    def sites(self, *, places: bool) -> Sites:
        """All sites whose channels may become linear or stand beside those, and what looks like one."""
        groups: dict[object, list[Passage]] = {}
        refused: list[tuple[Passage, str]] = []
        self._straight: dict[Step, Passage] = {}
        passages = Passages(self.ways)
        for root in self.ways.all:
            passage = passages.of(root)
            if passage is None:
                continue
            if passage.chain is None:
                self._straight[root] = passage
            elif passage.reason:
                refused.append((passage, passage.reason))
            else:
                groups.setdefault(_modules(passage), []).append(passage)
        chosen: list[tuple[list[Passage], Place]] = []
        for group in groups.values():
            place: Place | None = None
            reason = self._shared(group)
            if not reason:
                place, reason = self.placing.place_of([_chain(passage).calls for passage in group])
            if place is None:
                refused.append((group[0], reason))
            else:
                chosen.append((group, place))
        heads = self._heads([group for group, _ in chosen])
        built = [(group, self._site(group, place, i in heads)) for i, (group, place) in enumerate(chosen)]
        built += self._long(built)
        built = list(self._with_residuals(built))
        for passage, reason in refused:
            for step in passage.makers:
                self.not_linear.setdefault(self.graph.name(step), reason)
        refused.sort(key=lambda item: self.graph.position(_chain(item[0]).calls[0]))
        items, skipped = self._named(built, refused)
        if places:
            covered = {
                call for group, site in built if not site.pooled for each in group for call in _chain(each).calls
            }
            items += self._places(covered, skipped)
        items.sort(key=lambda item: item[0])
        trace = self.graph.trace
        params = sum(parameter.numel() for parameter in trace.model.parameters())
        return Sites(tuple(site for _, site in items), skipped=skipped, params=params, macs=trace.macs, kv=trace.kv)

    def _shared(self, group: Sequence[Passage]) -> str:
        """Why channels may not become linear because of calls of their layers elsewhere in the model."""
        for makes in (True, False):
            held: dict[nn.Module, set[Frame]] = {}
            for passage in group:
                steps = passage.makers if makes else passage.consumers
                for step in [*steps, *passage.norms(after=not makes)]:
                    if isinstance(step, Unit):
                        held.setdefault(step.module, set()).add(step.frame)
            for module, frames in held.items():
                for frame in self.graph.frames[module]:
                    if frame not in frames:
                        caller = frame.parent
                        where = f" by {caller.name or type(caller.module).__name__}" if caller is not None else ""
                        return f"{self.graph.names[module][0]} is also called{where} outside of this site"
        return ""

    # -------------------------------------------------------------------------------------------------------- sites

    def _site(self, group: Sequence[Passage], place: Place | None, head: bool) -> Site:
        """The site that a group of executions is; where nothing is activated, what stands between two maps."""
        first = group[0]
        producer = self._map([passage.producer for passage in group])
        gate = self._map([passage.gate for passage in group]) if first.gate is not None else None
        consumers: list[LinearMap] = []
        for module in dict.fromkeys(unit.module for unit in first.consumers if isinstance(unit, Unit)):
            readers = [c for passage in group for c in passage.consumers if isinstance(c, Unit) and c.module is module]
            reader = self._map(readers)
            consumers.append(replace(reader, size=first.pixels) if first.pixels is not None else reader)
        before, after = first.norms(after=False), first.norms(after=True)
        dropouts = dict.fromkeys(self.placing.dropout_place(call) for passage in group for call in passage.dropouts)
        site = Site(
            name="",
            kind=self._kind(first, producer, consumers, head),
            width=producer.d_out // (2 if first.packed else 1),
            producer=producer,
            consumers=tuple(consumers),
            activation=place,
            gate=gate,
            packed=first.packed,
            norm_before=self.graph.names[before[0].module][0] if before else "",
            norm_after=self.graph.names[after[0].module][0] if after else "",
            dropouts=tuple(filter(None, dropouts)),
            calls=len(group),
            channels_first=producer.kind == "conv2d",
            norm_params=sum(len([*norm.module.parameters(recurse=False)]) for norm in (*before, *after)),
            not_merged=self._not_merged(first),
            averaged=first.averaged,
            pooled=", ".join(call.name for call in first.pooled),
            not_linear=self._behind_pooling(first),
            not_narrow=_why_not_narrow(producer, consumers),
        )
        if first.chain is None:
            return site
        return self._activated(site, first.chain, len(group))

    def _map(self, steps: Sequence[Step | None]) -> LinearMap:
        return self.graph.linear_map([step for step in steps if isinstance(step, Unit)])

    def _activated(self, site: Site, f: Chain, calls: int) -> Site:
        """The site with what its activation is, with the parameters of one that is a module, and who else uses it."""
        owner = self.placing.owner_of(set(f.calls))
        site = replace(site, activation_name=activation_name(f.calls, owner))
        params = sum(parameter.numel() for parameter in owner.module.parameters()) if owner is not None else 0
        if owner is None or params == 0:
            return site
        names, used = self.graph.names[owner.module], len(self.graph.frames[owner.module])
        return replace(
            site,
            activation_params=params,
            activation_shared=used > calls or len(names) > 1,
            activation_origin=names[0],
            activation_calls=used,
        )

    def _kind(self, first: Passage, producer: LinearMap, consumers: Sequence[LinearMap], head: bool) -> Kind:
        """What the site is in the network, from the structure around it."""
        if first.gate is not None or first.packed:
            return "gated"
        if isinstance(first.producer, Unit) and not first.producer.source.fed:
            return "position MLP"
        plain = all((m.taps, m.groups, m.stride, m.padding) == (1, 1, (1, 1), (0, 0)) for m in (producer, *consumers))
        widening = producer.d_out > max(producer.d_in, *(c.d_out for c in consumers))
        if producer.kind == "conv2d" and not (plain and widening):
            return "convolution"
        return "head" if head else "feed-forward"

    def _heads(self, groups: Sequence[Sequence[Passage]]) -> set[int]:
        """Which groups are heads of the network: in no residual, and no maps but heads behind them."""
        read: set[Value] = set()
        for call in reversed(self.graph.trace.calls):
            if self.graph.is_map(self.graph.unit_of.get(call, call)) or any(value in read for value in call.outputs):
                read.update(call.inputs)
        by_producer = {group[0].producer: i for i, group in enumerate(groups)}
        last: set[int] = set()
        for i in reversed(range(len(groups))):
            consumers = [unit for passage in groups[i] for unit in passage.consumers]
            if any(not way.active for unit in consumers for _, way in self.ways.all[unit].sums):
                continue
            behind = [by_producer.get(consumer) for consumer in groups[i][0].consumers]
            goes_on = any(value in read for unit in consumers for value in made_by(unit))
            if not goes_on or all(n in last for n in behind):
                last.add(i)
        return last

    def _behind_pooling(self, passage: Passage) -> str:
        """Why an activation in front of a pooling is not a matter of the site, "" where there is no pooling."""
        if not passage.pooled:
            return ""
        title = self.graph.title(passage.pooled[0])
        place = 'the activation alone can go, as a place (find_sites with kinds="activation")'
        return f"the pooling {title} stands between; {place}"

    def _not_merged(self, passage: Passage) -> str:
        """Why two maps cannot be composed, "" if they can (zero padding between convolutions is the plan's affair)."""
        if passage.averaged:
            return "the average over all pixels stands between producer and consumers"
        if passage.pooled:
            return f"the pooling {self.graph.title(passage.pooled[0])} stands between producer and consumers"
        for unit in (passage.producer, *passage.consumers):
            if isinstance(unit, Unit) and getattr(unit.module, "padding_mode", "zeros") != "zeros":
                return f"{unit.frame.name} pads with {unit.module.padding_mode}, not zeros"
        return ""

    # -------------------------------------------------------------------------- through depthwise convolutions, sums

    def _long(self, built: Sequence[Built]) -> list[Built]:
        """Sites that go through depthwise convolutions: expand - f - depthwise - f - project, as in inverted residuals.

        A depthwise convolution maps every channel to itself. Between two other convolutions it divides one hidden width
        into two sites, neither of which can be narrowed alone; the long site around both can.
        """
        short = {tuple(passage.producer for passage in group): (group, site) for group, site in built}
        found: list[Built] = []
        for group, site in built:
            parts, last = [site], group
            while site.producer is not None and site.producer.groups == 1 and not site.gated:
                m = parts[-1].consumers[0]
                if len(parts[-1].consumers) > 1 or not m.groups == m.d_in == m.d_out > 1:
                    break
                units = tuple(consumer for passage in last for consumer in passage.consumers)
                last, part = short.get(units) or self._straight_site(units)
                if part is None or part.pooled or part.flattened:
                    break
                parts.append(part)
            consumers = parts[-1].consumers
            if len(parts) > 1 and not any(m.groups > 1 for m in consumers):
                ends = [replace(one, consumers=end.consumers) for one, end in zip(group, last, strict=True)]
                found.append((ends, _around(parts)))
        return found

    def _straight_site(self, units: Sequence[Step]) -> tuple[list[Passage], Site | None]:
        """What is between maps that some maps read without an activation; None where it is not the same for all."""
        group = [self._straight[unit] for unit in units if unit in self._straight]
        alike = len(group) == len(units) and len(set(map(_modules, group))) == 1
        if not alike or any(passage.reason for passage in group) or self._shared(group):
            return [], None
        return group, self._site(group, None, False)

    def _with_residuals(self, built: Sequence[Built]) -> Iterator[Built]:
        """The sites, each with the sum around it, or around the chain of sites that it is the last of."""
        behind: dict[tuple[Step, ...], list[Passage]] = {}
        for group, site in built:
            if len(site.consumers) == 1:
                behind[tuple(passage.consumers[0] for passage in group)] = group
        for group, site in built:
            residual, first, seen = self._residual(group, group), group, {id(group)}
            while residual is None:
                first = behind.get(tuple(passage.producer for passage in first), group)
                if id(first) in seen:
                    break
                seen.add(id(first))
                residual = self._residual(group, first)
            yield group, replace(site, residual=residual)

    def _residual(self, group: Sequence[Passage], first: Sequence[Passage]) -> Residual | None:
        """The sum of what a site gives and of what the first site of its chain reads, from all executions."""
        found: set[Residual | None] = set()
        for passage, begin in zip(group, first, strict=False):
            found.add(self._closing(passage, begin.producer) if len(group) == len(first) else None)
        return found.pop() if len(found) == 1 else None

    def _closing(self, passage: Passage, source: Step) -> Residual | None:
        """The call that adds what a map reads to a site's result, with nothing but a BatchNorm on the way."""
        last = passage.consumers[0]
        hidden = self.ways.all[last]
        if len(passage.consumers) > 1 or not isinstance(source, Unit) or len(hidden.sums) != 1:
            return None
        call, way = hidden.sums[0]
        value = next(value for value in call.inputs if value in hidden.ways)
        norms = [step for step in way.steps if isinstance(step, Unit)]
        others = [step for step in way.steps if isinstance(step, Chain) or (isinstance(step, Call) and not _idle(step))]
        summands = list(call.args)
        if others or way.reason or len(norms) > 1 or set(hidden.readers) != {*way.steps, call}:
            return None
        if any(len(self.graph.frames[norm.module]) > 1 for norm in norms):
            return None
        passed = [each for each, to in hidden.ways.items() if not to.reason]
        if any(each.output or each.clobbered or self._handed_on(each) for each in passed):
            return None
        if call.name != "add" or call.kwargs or summands not in ([value, source.source], [source.source, value]):
            return None
        place, _ = self.placing.call_place({call}, call.frame)
        if place is None or value.shape != source.source.shape:
            return None
        norm = self.graph.names[norms[0].module][0] if norms else ""
        return Residual(place, summands.index(value), norm, self.graph.names[source.module][0])

    def _handed_on(self, value: Value) -> bool:
        """Whether a module other than an identity hands a value on as it is: in training it may do more (DropPath)."""
        for frame in self.graph.trace.frames:
            handed = frame.outputs == [value] and value in frame.args and value.call not in list(frame.calls())
            if handed and not isinstance(frame.module, nn.Identity):
                return True
        return False

    # -------------------------------------------------------------------------------------------------------- names

    def _named(
        self, built: Sequence[Built], refused: Sequence[tuple[Passage, str]]
    ) -> tuple[list[tuple[int, Site]], dict[str, str]]:
        """The sites with their names and their position in the execution, and the skipped ones by name."""
        prefixes = [self._prefix(group[0]) for group, site in built if not site.between]
        prefixes += [self._prefix(passage) for passage, _ in refused]
        short = [site for _, site in built if not site.between]
        items = []
        taken: set[str] = set()
        for group, site in built:
            prefix = common_prefix([m.name for m in site.maps])
            others = prefixes.count(prefix) - 1
            name = site.maps[-len(site.consumers) - 1].name
            if site.between:
                within = [s for s in short if {m.name for m in s.maps} <= {m.name for m in site.maps}]
                others += 1 - sum(prefix == common_prefix([m.name for m in s.maps]) for s in within) + (prefix in taken)
                name = f"{site.maps[0].name}...{site.consumers[0].name}"
            name = prefix if prefix and not others else name
            taken.add(name)
            items.append((self.graph.position(_chain(group[0]).calls[0]), replace(site, name=name)))
        skipped: dict[str, str] = {}
        for (passage, reason), prefix in zip(refused, prefixes[len(short) :], strict=True):
            name = prefix if prefix and prefixes.count(prefix) == 1 else self.graph.name(passage.producer)
            if name not in taken:
                skipped.setdefault(name, reason)
        items.sort(key=lambda item: item[0])
        return items, skipped

    def _prefix(self, passage: Passage) -> str:
        """The common dotted prefix of a site's maps."""
        return common_prefix([self.graph.name(step) for step in passage.maps])

    # ----------------------------------------------------------------------------------------------- places

    def _places(self, covered: set[Call], skipped: dict[str, str]) -> list[tuple[int, Site]]:
        """The activations that stand in no site, with their position; those that cannot be exchanged are skipped."""
        groups: dict[Any, list[Chain]] = {}
        for one in self.ways.chains:
            if not covered & set(one.calls) and _stands_alone(one):
                frame = self.placing.frame_of(set(one.calls))
                calls = tuple((c.name, c.ordinal, c.frame.module, c.frame.ordinal) for c in one.calls)
                groups.setdefault((frame.module, calls), []).append(one)
        items = []
        for group in groups.values():
            first = group[0]
            place, reason = self.placing.place_of([one.calls for one in group])
            if place is None:
                frame, call = self.placing.frame_of(set(first.calls)), first.calls[0]
                skipped.setdefault(f"{frame.name or 'model'}:{call.name}#{call.ordinal}", reason)
                continue
            site = Site(
                name=str(place),
                kind="activation",
                width=0,
                producer=None,
                consumers=(),
                activation=place,
                norm_before=self._norm_of([one.entry for one in group]),
                calls=len(group),
                channels_first=self._is_spatial(first.entry),
            )
            items.append((self.graph.position(first.calls[0]), self._activated(site, first, len(group))))
        return items

    def _norm_of(self, values: Sequence[Value]) -> str:
        """The BatchNorm whose output some values are, "" where it is none or not the same for all."""
        norms: set[str] = set()
        for value in values:
            step = self.graph.source(value)
            while isinstance(step, Call) and step.name in UNCHANGED and step.inputs:
                step = self.graph.source(step.inputs[0])
            usable = isinstance(step, Unit) and step.kind == "norm" and not step.problem
            norms.add(self.graph.names[step.module][0] if isinstance(step, Unit) and usable else "")
        return norms.pop() if len(norms) == 1 else ""

    def _is_spatial(self, value: Value) -> bool:
        """Whether a value has its channels in dimension 1, as the convolution that is the next map before it."""
        waiting, seen = [value], {value}
        while waiting and len(seen) < FARTHEST:
            step = self.graph.source(waiting.pop(0))
            if isinstance(step, Unit) and step.kind == "map":
                return isinstance(step.module, _ConvNd) and len(step.result.shape) == len(value.shape)
            onward = [step.source] if isinstance(step, Unit) else step.inputs if step is not None else []
            waiting += [each for each in onward if each not in seen and each.fed]
            seen.update(onward)
        return False


def _chain(passage: Passage) -> Chain:
    assert passage.chain is not None
    return passage.chain


def _modules(passage: Passage) -> tuple[nn.Module, ...]:
    """The modules of a passage; executions with the same ones are calls of one site."""
    norms = [*passage.norms(after=False), *passage.norms(after=True)]
    return tuple(step.module for step in (*passage.makers, *norms, *passage.consumers) if isinstance(step, Unit))


def _stands_alone(f: Chain) -> bool:
    """Whether a chain is an activation that is no part of a gate."""
    if not any(call.name in ACTIVATIONS for call in f.calls) or not f.entry.fed or f.entry.elements < 2:
        return False
    onward = [reader for reader in f.end.readers if reader.outputs]
    return not onward or any(r.name not in ("mul", "glu") or len(moving(r)) < 2 for r in onward)


def _around(parts: Sequence[Site]) -> Site:
    """One site around several that follow each other."""
    between: list[Between] = []
    for part in parts[1:]:
        assert part.producer is not None
        between.append(
            Between(
                part.producer,
                part.norm_before,
                part.activation,
                part.activation_name,
                part.norm_after,
                part.activation_params,
            )
        )
    maps = [m.name for m in parts[0].maps[:1]] + [b.map.name for b in between] + [parts[-1].consumers[0].name]
    names = " and ".join(f"{a} - {b}" for a, b in pairwise(maps))
    return replace(
        parts[0],
        kind="convolution",
        consumers=parts[-1].consumers,
        dropouts=tuple(dict.fromkeys(place for part in parts for place in part.dropouts)),
        not_linear=f"it is for narrowing; the sites {names} in it become linear one by one",
        norm_params=sum(part.norm_params for part in parts),
        averaged=parts[-1].averaged,
        not_merged="",
        not_narrow="",
        between=tuple(between),
    )


def _why_not_narrow(producer: LinearMap, consumers: Sequence[LinearMap]) -> str:
    """Why channels cannot be kept and dropped one by one, "" if they can."""
    for m in (producer, *consumers):
        if m.groups > 1:
            how = "depthwise" if m.groups == m.d_in == m.d_out else "grouped"
            return f"{m.name} is a {how} convolution, which ties the channels on its two sides together"
    return ""


def _idle(call: Call) -> bool:
    """Whether a call does nothing, in training neither."""
    given = dict(zip(("input", "p"), call.args, strict=False)) | dict(call.kwargs)
    return call.name in UNCHANGED or (call.name in DROPOUT and float(given.get("p", 0.5)) == 0)
