"""Norms over channels: modules that can be computed on the channels that stay.

averages_of(followed)[run]          # the norms over a run; no entry where an average is taken outside of a norm
"""

from __future__ import annotations

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, runs, spans
from shallower.finding.channels.weights import COLUMNS_FIRST, PRODUCTS, ROWS_FIRST
from shallower.recording.tracing import Call, Frame, Value
from shallower.sites import Average

LINEAR_MAPS = ROWS_FIRST | COLUMNS_FIRST | PRODUCTS


def averages_of(f: Following) -> dict[Run, tuple[Average, ...]]:
    """The norms over each run of channels all of whose averages are taken in norms."""
    found: dict[Run, dict[str, Average]] = {}
    outside: set[Run] = set()
    known: dict[Frame, Value | None] = {}
    for layout, call in f.averages:
        for run in set(runs(layout)):
            if run.closed or run in outside:
                continue
            norm = _norm_around(f, call, run, known)
            if norm is None:
                outside.add(run)
            else:
                found.setdefault(run, {})[norm.module] = norm
    _refuse_shared(f, found, outside, known)
    return {run: tuple(norms.values()) for run, norms in found.items() if run not in outside}


def _refuse_shared(
    f: Following, found: dict[Run, dict[str, Average]], outside: set[Run], known: dict[Frame, Value | None]
) -> None:
    """Leave out the runs under a norm that is called on other channels, too: it computes on all of those."""
    calls: dict[str, list[Frame]] = {}
    for frame in f.trace.frames:
        calls.setdefault(frame.name or "", []).append(frame)
    for run, norms in found.items():
        for name in norms:
            for frame in calls[name]:
                if frame not in known:
                    known[frame] = _source(frame)
                source = known[frame]
                if source is None or not any(run in set(runs(axis)) for axis in f.axes(source)):
                    outside.add(run)


def _norm_around(f: Following, call: Call, run: Run, known: dict[Frame, Value | None]) -> Average | None:
    """The innermost module around a call that makes one tensor of another of its shape, channel for channel."""
    for frame in call.frame.ancestors():
        if not frame.name:
            return None
        if frame not in known:
            known[frame] = _source(frame)
        source = known[frame]
        if source is None:
            continue
        axes = f.axes(source)
        dims = [dim for dim, axis in enumerate(axes) if run in set(runs(axis))]
        if len(dims) != 1:
            continue
        own = spans(axes[dims[0]], run)
        if own != spans(f.axes(frame.outputs[0])[dims[0]], run):
            continue
        return Average(frame.name, dims[0] - len(axes), axes[dims[0]].size, tuple(own))
    return None


def _source(frame: Frame) -> Value | None:
    """The one tensor that a module reads, where it gives one of the same shape without a linear map; else None."""
    if sum(item is not None for item in (*frame.args, *frame.kwargs.values())) != 1:
        return None
    made: set[Value] = set()
    read: set[Value] = set()
    for call in frame.calls():
        if call.name in LINEAR_MAPS:
            return None
        read |= {value for value in call.inputs if value.fed and value not in made}
        made |= set(call.outputs)
    if len(read) != 1 or len(frame.outputs) != 1:
        return None
    (source,) = read
    if source.shape != frame.outputs[0].shape or frame.outputs[0] not in made:
        return None
    return source
