"""The spaces of a followed pass: runs of channels with all the tensors in which they stand."""

from __future__ import annotations

from dataclasses import dataclass, field

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, Span, runs, spans
from shallower.recording.tracing import Value


@dataclass
class Space:
    """Channels that are cut together, and where they stand."""

    run: Run
    slots: list[tuple[str, int, list[Span]]] = field(default_factory=list)


def spaces(f: Following) -> tuple[list[Space], dict[str, str]]:
    names = {m: n for n, m in f.trace.model.named_modules()}
    found: dict[Run, Space] = {}
    skipped: dict[str, str] = {}
    tensors: dict[Value, str] = {}
    for (owner, attribute), value in f.trace.weights.items():
        tensors.setdefault(value, f"{names[owner]}.{attribute}".lstrip("."))
    for value in list(f._axes):
        if value.origin == "buffer":
            tensors.setdefault(value, f"{names[value.owner]}.{value.name}".lstrip("."))
    for value, name in tensors.items():
        for axis, layout in enumerate(f.axes(value)):
            for run in dict.fromkeys(runs(layout)):
                if run.closed:
                    skipped.setdefault(f"{name}[{axis}]", run.closed)
                    continue
                if run.size == 1:
                    continue
                found.setdefault(run, Space(run)).slots.append((name, axis, spans(layout, run)))
    return list(found.values()), skipped
