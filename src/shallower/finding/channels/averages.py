"""Norms over channels: modules that can be computed on the channels that stay.

averages_of(followed)[run]          # the norms over a run; no entry where an average is taken outside of a norm
"""

from __future__ import annotations

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, all_runs, runs, spans
from shallower.finding.channels.weights import COLUMNS_FIRST, PRODUCTS, ROWS_FIRST
from shallower.recording.tracing import Call, Frame, Value
from shallower.sites import Average

LINEAR_MAPS = ROWS_FIRST | COLUMNS_FIRST | PRODUCTS


def averages_of(f: Following) -> dict[Run, tuple[Average, ...]]:
    """The norms over each run of channels all of whose averages are taken in norms."""
    found: dict[Run, dict[str, Average]] = {}
    outside: set[Run] = set()
    known: dict[Frame, list[Value]] = {}
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
    f: Following, found: dict[Run, dict[str, Average]], outside: set[Run], known: dict[Frame, list[Value]]
) -> None:
    """Leave out the runs under a norm that is called on other channels, too: it computes on all of those."""
    calls: dict[str, list[Frame]] = {}
    for frame in f.trace.frames:
        calls.setdefault(frame.name or "", []).append(frame)
    for run, norms in found.items():
        for name in norms:
            for frame in calls.get(name, ()):  # none of an entry of a list that did not run
                if frame not in known:
                    known[frame] = _sources(frame)
                if not known[frame] or run not in set(all_runs(f.axes(known[frame][0]))):
                    outside.add(run)


def _norm_around(f: Following, call: Call, run: Run, known: dict[Frame, list[Value]]) -> Average | None:
    """The innermost module around a call that makes one tensor of others of its shape, channel for channel."""
    for frame in call.frame.ancestors():
        if not frame.name:
            return None
        if frame not in known:
            known[frame] = _sources(frame)
        if not known[frame]:
            continue
        axes = f.axes(known[frame][0])
        dims = [dim for dim, axis in enumerate(axes) if run in set(runs(axis))]
        if len(dims) != 1:
            continue
        own = spans(axes[dims[0]], run)
        if any(own != spans(f.axes(value)[dims[0]], run) for value in (*known[frame][1:], frame.outputs[0])):
            continue
        return Average(frame.name, dims[0] - len(axes), axes[dims[0]].size, tuple(own))
    return None


def _sources(frame: Frame) -> list[Value]:
    """The tensors that a module reads, a gate beside the channels for instance; none unless it gives one like each.

    A module with a linear map is no norm, and one with other arguments computes more than the tensors show.
    """
    made: set[Value] = set()
    read: dict[Value, None] = {}
    for call in frame.calls():
        if call.name in LINEAR_MAPS:
            return []
        # what does not depend on the inputs may be read, too: the start of a sequence, queries
        read |= dict.fromkeys(v for v in call.inputs if (v.fed or v.call is not None) and v not in made)
        made |= set(call.outputs)
    given = [item for item in (*frame.args, *frame.kwargs.values()) if item is not None]
    if not read or len(given) != len(read) or len(frame.outputs) != 1 or frame.outputs[0] not in made:
        return []
    if any(value.shape != frame.outputs[0].shape for value in read):
        return []
    return list(read)
