"""What was seen at one site: Gram matrices of what its consumers read and should give, and rows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shallower.calibrating.grams import Gram
from shallower.sites import LinearMap, Site

_HIDDEN_VALUES = 1 << 22
"""Hidden values that are computed at a time."""

Shapes = Mapping[str, tuple[int, int]]
"""Columns and outputs of the Gram matrices "fit", "inputs" and "joint"."""

HELD_OUT = 8
"""One row in eight is held out."""


@dataclass(frozen=True)
class SiteRows:
    """What a site reads and should give.

    Attributes:
        x: (rows, d_in), or (images, d_in, height, width) where the maps are convolutions.
        y: (rows, d) or (images, d, height, width), the consumers' outputs side by side.
    """

    x: Tensor
    y: Tensor

    def chunks(self, width: int) -> Iterator[SiteRows]:
        """The rows, so many at a time as a hidden tensor of this width allows."""
        each = max(1, self.x[0].numel() // self.x.shape[1]) * width
        rows = max(1, _HIDDEN_VALUES // each)
        for x, y in zip(torch.split(self.x, rows), torch.split(self.y, rows), strict=True):
            yield SiteRows(x, y)

    @property
    def positions(self) -> int:
        """Outputs that count."""
        return self.y.numel() // self.y.shape[1]


@dataclass(frozen=True)
class SiteGrams:
    """What was seen at one site; rows for fitting and rows that are held out.

    Attributes:
        fit, held: from what the consumers read (patches of it, for a convolution) to what they should give.
        inputs: (fit, held) from what the producer reads, for a full collapse; None where that was not asked for, or
            where it reads other positions.
        joint: (fit, held) from what the consumers and what the producer read, side by side; None where that was not
            asked for or `inputs` is None.
        rows: (fit, held), what the producer reads and the consumers should give at some of the positions; empty where
            that was not asked for. Of this process alone.
        units: (d,) what a unit of each of the consumers' outputs becomes in the sum that it goes into; ones where it
            goes into none.
        positions: of the rows for fitting, kept or not; of all processes together.
    """

    fit: Gram
    held: Gram
    inputs: tuple[Gram, Gram] | None = None
    joint: tuple[Gram, Gram] | None = None
    rows: tuple[Sequence[SiteRows], Sequence[SiteRows]] = ((), ())
    units: Tensor | None = None
    positions: float = 0.0

    @classmethod
    def of(cls, z: Tensor, x: Tensor | None, y: Tensor, *, joint: bool = False, number: int = 0) -> SiteGrams:
        """The rows of one call, of which the last ones are held out: z, x and y at the same positions.

        Of calls with fewer than eight rows not every one has one of these, by their `number`.
        """
        # the last rows, not some in between: neighbours are alike, and would make the held-out error too small
        cut = fitted_rows(len(y), number)

        def pair(read: Tensor) -> tuple[Gram, Gram]:
            return Gram.of(read[:cut], y[:cut]), Gram.of(read[cut:], y[cut:])

        fit, held = pair(z)
        if x is None:
            return cls(fit, held)
        both = None
        if joint:
            both = pair(torch.cat([z, x.to(z.dtype)], 1))
        return cls(fit, held, pair(x), both)

    @classmethod
    def empty(cls, shapes: Shapes, device: torch.device) -> SiteGrams:
        """Nothing seen yet."""
        pairs = {}
        for name, (columns, outputs) in shapes.items():
            nothing = Gram(columns, outputs, device=device)
            pairs[name] = nothing, nothing
        return cls(*pairs["fit"], pairs.get("inputs"), pairs.get("joint"))

    @property
    def shapes(self) -> Shapes:
        """Columns and outputs of each pair."""
        return {name: (fit.columns, fit.outputs) for name, (fit, _) in self._pairs.items()}

    @property
    def _pairs(self) -> dict[str, tuple[Gram, Gram]]:
        pairs = {"fit": (self.fit, self.held)}
        if self.inputs is not None:
            pairs["inputs"] = self.inputs
        if self.joint is not None:
            pairs["joint"] = self.joint
        return pairs

    def __add__(self, other: SiteGrams) -> SiteGrams:
        """The sums of both."""
        others, total = other._pairs, {}
        for name, (fit, held) in self._pairs.items():
            total[name] = fit + others[name][0], held + others[name][1]
        return self._with(total)

    def over_processes(self) -> SiteGrams:
        """The sums of all processes."""
        total = {}
        for name, (fit, held) in self._pairs.items():
            total[name] = fit.over_processes(), held.over_processes()
        return self._with(total)

    def _with(self, pairs: Mapping[str, tuple[Gram, Gram]]) -> SiteGrams:
        fit, held = pairs["fit"]
        return replace(self, fit=fit, held=held, inputs=pairs.get("inputs"), joint=pairs.get("joint"))

    @property
    def all(self) -> Gram:
        """All rows."""
        return self.fit + self.held


def fitted_rows(rows: int, number: int) -> int:
    """How many of a call's rows are for fitting; those behind them are held out.

    Of calls alike one row in eight is, however few each has.
    """
    return rows - ((number + 1) * rows // HELD_OUT - number * rows // HELD_OUT)


def read_alike(site: Site) -> bool:
    """Whether all that a consumer's output at a position depends on is what the producer reads at this position."""
    if not site.bridge.direct:
        return False
    if all(m.kind != "conv2d" for m in site.maps):
        return True
    return all(map(_is_pointwise, site.maps))


def _is_pointwise(m: LinearMap) -> bool:
    return m.kind == "conv2d" and m.taps == 1 and m.stride == (1, 1) and m.padding == (0, 0)


def may_collapse(site: Site) -> bool:
    """Whether least squares can make one linear map of the site."""
    if any(m.kind == "conv2d" for m in site.maps):
        return False
    return site.bridge.not_linear is None and site.producer is not None and site.calls == 1
