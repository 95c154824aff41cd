"""Averages over channels: calls that can compute on the channels that stay, those of norms and others.

averages_of(followed, places)[run]      # the averages over a run; no entry where one of them cannot be found again
"""

from __future__ import annotations

from shallower.finding.channels.choices import CallPlaces
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, runs, spans
from shallower.recording.tracing import Call
from shallower.sites import Average


def averages_of(f: Following, places: CallPlaces) -> dict[Run, tuple[Average, ...]]:
    """The averages over each run of channels, where every forward takes each of them again."""
    found: dict[Run, dict[Average, None]] = {}
    lost: set[Run] = set()
    for layout, call in f.averages:
        for run in set(runs(layout)):
            if run.closed or run in lost:
                continue
            average = _average(f, call, run, places)
            if average is None:
                lost.add(run)
            else:
                found.setdefault(run, {})[average] = None
    return {run: tuple(own) for run, own in found.items() if run not in lost}


def _average(f: Following, call: Call, run: Run, places: CallPlaces) -> Average | None:
    """A call as one that is found again; None where the run stands in several dimensions, or in none."""
    axes = f.axes(call.inputs[0])
    dims = [dim for dim, axis in enumerate(axes, -len(axes)) if run in set(runs(axis))]
    if len(dims) != 1:
        return None
    (dim,) = dims
    place = places.of(call, dim, run)
    if place is None:
        return None
    frame, ordinal = place
    return Average(frame.name or "", call.name, ordinal, dim, axes[dim].size, tuple(spans(axes[dim], run)))
