"""The minutes of a compression: what is left of them, what work takes, and what was decided by them.

clock = Clock(120.0, started)
pace = measured_pace(model, batches)
rows = pace.rows_for(0.4 * clock.left)
decisions.number("rows", lambda: rows)      # the same number again after an interruption
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shallower.app.options import MINUTES
from shallower.core.codec import decode, encode
from shallower.core.files import read_json, write_json
from shallower.core.inputs import call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.trees import rows_of, to_device
from shallower.errors import CheckpointError

_INVERTED = 512
_INVERSES = 6
"""Of a site's Gram matrix, in which as much is computed as its channels take to be chosen, thrice, and fitted."""


@dataclass(frozen=True)
class Clock:
    """How much of some seconds is left.

    Attributes:
        seconds: for everything.
        started: when they began, by `time.perf_counter`.
    """

    seconds: float
    started: float

    @classmethod
    def begun(cls, minutes: float = MINUTES) -> Clock:
        """So many minutes from now on."""
        return cls(60 * minutes, time.perf_counter())

    @property
    def spent(self) -> float:
        """Seconds that are gone."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left; 0 where none are."""
        return max(0.0, self.seconds - self.spent)


@dataclass(frozen=True)
class RowPace:
    """What work on one row takes, in seconds, measured here and now.

    Attributes:
        read: to make it a part of a batch: tokens out of text, pixels out of a picture.
        forward: of the model.
    """

    read: float
    forward: float

    def of_rows(self, rows: float, passes: float) -> float:
        """Seconds for so many rows, read once, with so many forward passes each."""
        return rows * (self.read + passes * self.forward)


def measured_pace(model: nn.Module, batches: Iterable[Any]) -> RowPace:
    """The pace on the second of these batches, or on the first where there is one only.

    pace = measured_pace(model, loader)
    """
    reading = forward = 1e-9
    rows = 1
    with evaluating(model), torch.inference_mode():
        begun = time.perf_counter()
        for batch in islice(batches, 2):
            read = time.perf_counter()
            inputs = to_device(default_inputs_of(batch), model_device(model))
            call(model, inputs)
            reading, forward = read - begun, time.perf_counter() - read
            rows = rows_of(inputs) or 1
            begun = time.perf_counter()
    return RowPace(reading / rows, forward / rows)


def algebra_seconds(widths: Iterable[int]) -> float:
    """Seconds in which channels of sites so wide are chosen and fitted: an inverse in float64 is timed here and now."""
    matrix = torch.eye(_INVERTED, dtype=torch.float64) * 2 + torch.full(
        (_INVERTED, _INVERTED), 1e-3, dtype=torch.float64
    )
    torch.linalg.inv(matrix[:8, :8])
    begun = time.perf_counter()
    torch.linalg.inv(matrix)
    one = time.perf_counter() - begun
    return _INVERSES * one * sum((width / _INVERTED) ** 3 for width in widths)


class Decisions:
    """Numbers that the clock decided. They are kept, so that an interrupted run goes on with the same.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, float] = {}
        if path is not None and path.exists():
            found: Mapping[str, float] = decode(
                Mapping[str, float], read_json(path, error=CheckpointError), at=str(path), error=CheckpointError
            )
            self._known |= found

    def number(self, name: str, decide: Callable[[], float]) -> float:
        """The number of that name: as it was decided first."""
        if name not in self._known:
            self._known[name] = decide()
            if self._path is not None:
                write_json(self._path, encode(self._known), error=CheckpointError)
        return self._known[name]


def spoken(seconds: float) -> str:
    """A time for people: "8 s", "2.5 min", "3 h".

    spoken(150)     # "2.5 min"
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.2g} h"
