"""Sites that go through depthwise convolutions: expand - f - depthwise - f - project, as in inverted residuals.

A depthwise convolution maps every channel to itself. Between two other convolutions it divides one hidden width into
two sites, neither of which can be narrowed alone; the long site around both can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from shallower.finding.candidates import MOST_STEPS, Found
from shallower.finding.graph import Graph, Step, Unit
from shallower.finding.pointwise import UNCHANGED
from shallower.recording.tracing import Call
from shallower.sites import Between, LinearMap, Site

Built = tuple[list[Found], Site]
"""The executions of a site, and the site, still without a name."""


def long_sites(graph: Graph, built: Sequence[Built]) -> list[Built]:
    """The long sites that begin with a short one whose consumer is a depthwise convolution."""
    following = {tuple(found.producer for found in group): (group, site) for group, site in built}
    result = []
    for group, site in built:
        if site.producer is None or site.producer.groups > 1 or site.gated:
            continue
        parts, between, consumers, params = [site], list[Between](), site.consumers, site.norm_params
        readers: list[list[Step]] = [found.consumers for found in group]
        while _is_depthwise(consumers):
            units = [unit for step in readers for unit in step if isinstance(unit, Unit)]
            if tuple(units) in following:
                behind, part = following[tuple(units)]
                if part.pooled or part.flattened:
                    consumers = ()
                    break
                parts.append(part)
                params += part.norm_params
                between.append(
                    Between(
                        consumers[0],
                        part.norm_before,
                        part.activation,
                        part.activation_name,
                        part.norm_after,
                        part.activation_params,
                    )
                )
                consumers, readers = part.consumers, [found.consumers for found in behind]
            else:
                norms, readers = _straight(graph, units)
                between.append(Between(consumers[0], "".join(graph.names[norm][0] for norm in norms)))
                params += sum(len(dict(norm.named_parameters(recurse=False))) for norm in norms)
                consumers = _described(graph, readers)
        if between and consumers and not any(m.groups > 1 for m in consumers):
            ends = [replace(found, consumers=read) for found, read in zip(group, readers, strict=True)]
            result.append((ends, _long(parts, between, consumers, params)))
    return result


def _long(
    parts: Sequence[Site], between: Sequence[Between], consumers: tuple[LinearMap, ...], norm_params: int
) -> Site:
    first = parts[0]
    maps = [m.name for m in first.maps[:1]] + [b.map.name for b in between] + [consumers[0].name]
    short = " and ".join(f"{a} - {b}" for a, b in pairwise(maps))
    return replace(
        first,
        kind="convolution",
        consumers=consumers,
        dropouts=tuple(dict.fromkeys(place for part in parts for place in part.dropouts)),
        not_linear=f"it is for narrowing; the sites {short} in it become linear one by one",
        norm_params=norm_params,
        not_merged="",
        not_narrow="",
        between=tuple(between),
    )


def _is_depthwise(consumers: Sequence[LinearMap]) -> bool:
    if len(consumers) != 1:
        return False
    m = consumers[0]
    return m.groups == m.d_in == m.d_out > 1


def _straight(graph: Graph, units: Sequence[Unit]) -> tuple[set[nn.Module], list[list[Step]]]:
    """The BatchNorm behind a map and the maps that read it, in each execution; none where anything else is there."""
    norms: set[nn.Module] = set()
    readers: list[list[Step]] = []
    for unit in units:
        value, read = unit.result, list[Step]()
        own: list[Unit] = []
        for _ in range(MOST_STEPS):
            read = graph.readers(value)
            reader = read[0] if len(read) == 1 else None
            if value.output or value.clobbered:
                return set(), []
            if isinstance(reader, Unit) and reader.kind == "norm" and not reader.problem and not own:
                own.append(reader)
                value = reader.result
            elif isinstance(reader, Call) and reader.name in UNCHANGED:
                value = reader.outputs[0]
            else:
                break
        norms |= {norm.module for norm in own}
        readers.append(read)
    steps = [step for read in readers for step in read]
    modules = {step.module for step in steps if isinstance(step, Unit) and step.kind == "map" and not step.problem}
    calls = [len(graph.frames[module]) for module in modules | norms]
    if len(modules) * len(units) != len(steps) or len(norms) > 1 or any(count != len(units) for count in calls):
        return set(), []
    return norms, readers


def _described(graph: Graph, readers: Sequence[Sequence[Step]]) -> tuple[LinearMap, ...]:
    units = [unit for read in readers for unit in read if isinstance(unit, Unit)]
    modules = dict.fromkeys(unit.module for unit in units)
    return tuple(graph.linear_map([unit for unit in units if unit.module is module]) for module in modules)
