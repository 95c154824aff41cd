"""The sum that closes right around a site: site(x) + x, with the very x that the site reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from shallower.finding.candidates import MOST_STEPS, Found
from shallower.finding.graph import Graph, Unit
from shallower.finding.placing import Placing
from shallower.finding.pointwise import DROPOUT, UNCHANGED
from shallower.recording.tracing import Call, Value
from shallower.sites import Residual, Site

Built = tuple[list[Found], Site]
"""The executions of a site, and the site."""


def with_residuals(graph: Graph, placing: Placing, built: Sequence[Built]) -> list[Built]:
    """The sites, each with the sum around it, or around the chain of sites that it is the last of."""
    behind = {tuple(found.consumers[0] for found in group): group for group, site in built if len(site.consumers) == 1}
    result = []
    for group, site in built:
        residual, first, seen = _residual(graph, placing, group, group), group, {id(group)}
        while residual is None:
            first = behind.get(tuple(found.producer for found in first), group)
            if id(first) in seen:
                break
            seen.add(id(first))
            residual = _residual(graph, placing, group, first)
        result.append((group, replace(site, residual=residual)))
    return result


def _residual(graph: Graph, placing: Placing, group: Sequence[Found], first: Sequence[Found]) -> Residual | None:
    """The sum of what a site gives and of what the first site of its chain reads, from all executions."""
    sources = [found.producer for found in first]
    units = [unit for unit in sources if isinstance(unit, Unit)]
    if len(units) != len(group):
        return None
    sums = [_closing(graph, found, unit.source) for found, unit in zip(group, units, strict=True)]
    closing = sums[0]
    if closing is None or any(other is None or other[1:] != closing[1:] for other in sums):
        return None
    places = {placing.call_place({other[0]}, other[0].frame)[0] for other in sums if other is not None}
    place = places.pop() if len(places) == 1 else None
    if place is None:
        return None
    return Residual(place, branch=closing[1], norm=closing[2], source=graph.names[units[0].module][0])


def _closing(graph: Graph, found: Found, source: Value) -> tuple[Call, int, str] | None:
    """The call that adds `source` to a site's result, which summand the result is, and the BatchNorm on the way."""
    last = found.consumers[0]
    if len(found.consumers) != 1 or not isinstance(last, Unit):
        return None
    value, norm = last.result, ""
    for _ in range(MOST_STEPS):
        readers = graph.readers(value)
        if len(readers) != 1 or value.output or value.clobbered or _handed_on(graph, value):
            return None
        reader = readers[0]
        if isinstance(reader, Unit):
            if reader.kind != "norm" or reader.problem or norm or len(graph.frames[reader.module]) > 1:
                return None
            norm, value = graph.names[reader.module][0], reader.result
        elif reader.name in UNCHANGED or (reader.name in DROPOUT and _rate(reader) == 0):
            value = reader.outputs[0]
        elif reader.name == "add" and len(reader.args) == 2 and not reader.kwargs and value.shape == source.shape:
            summands = list(reader.args)
            return (reader, summands.index(value), norm) if summands in ([value, source], [source, value]) else None
        else:
            return None
    return None


def _handed_on(graph: Graph, value: Value) -> bool:
    """Whether a module other than an identity hands the value on as it is: in training it may do more (DropPath)."""
    return any(
        frame.outputs == [value] and value in frame.args and value.call not in list(frame.calls())
        for frame in graph.trace.frames
        if not isinstance(frame.module, nn.Identity)
    )


def _rate(call: Call) -> float:
    given = dict(zip(("input", "p"), call.args, strict=False)) | dict(call.kwargs)
    return float(given.get("p", 0.5))
