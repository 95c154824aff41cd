"""Second moments of what a site reads and gives, added up over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import FitError
from shallower.sites import LinearMap, Site

_ROWS = 1 << 10

_COLUMNS = 256

_PER_COLUMN = 256

_VALUES = 1 << 22


@dataclass(frozen=True)
class Gram:
    """Sums over positions of z, y and their products: all that least squares from z to y needs.

        total = Gram.of(z, y) + Gram.of(z2, y2)

    Attributes:
        count: positions seen.
        z, y: (n,) and (d,) float64, sums.
        zz, zy: (n, n) and (n, d) float64, sums of products.
        yy: (d,) float64, sums of squares.
    """

    count: float
    z: Tensor
    y: Tensor
    zz: Tensor
    zy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor, *, quick: bool = False) -> Gram:
        """Of samples: z (positions, n) and y (positions, d), of any dtype.

        With `quick`, products of up to 1,024 rows are added up in float32: twice as fast, and right to about 1e-6.
        """
        return cls.empty(z.shape[1], y.shape[1], z.device).extended([z], y, quick=quick)

    def extended(self, z: Sequence[Tensor], y: Tensor, *, quick: bool = False) -> Gram:
        """With more samples, which are added to the sums of this one in place.

        Args:
            z: side by side; (positions, n) together.
            y: (positions, d).
            quick: see `of`.
        """
        dtype = torch.float32 if quick else torch.float64
        for start in range(0, len(y), _ROWS):
            rows = slice(start, start + _ROWS)
            parts, b = [part[rows].to(dtype) for part in z], y[rows].to(dtype)
            a = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            self.z.add_(a.sum(0))
            self.y.add_(b.sum(0))
            self.yy.add_(b.square().sum(0))
            for left in range(0, a.shape[1], _COLUMNS):
                # the blocks on and above the diagonal are enough
                part = a[:, left : left + _COLUMNS].T
                self._add(self.zz[left : left + _COLUMNS, left:], part, a[:, left:])
                self._add(self.zy[left : left + _COLUMNS], part, b)
        for left in range(_COLUMNS, a.shape[1] if len(y) else 0, _COLUMNS):
            self.zz[left : left + _COLUMNS, :left] = self.zz[:left, left : left + _COLUMNS].T
        return replace(self, count=self.count + len(y))

    @staticmethod
    def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            total.add_(left @ right)

    def part(self, columns: slice) -> Gram:
        """Of some of the columns of z alone; the sums are views."""
        return replace(self, z=self.z[columns], zz=self.zz[columns, columns], zy=self.zy[columns])

    @classmethod
    def empty(cls, n: int, d: int, device: torch.device | str = "cpu") -> Gram:
        """Of nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0.0, zeros(n), zeros(d), zeros(n, n), zeros(n, d), zeros(d))

    def __add__(self, other: Gram) -> Gram:
        """Of both samples together."""
        if self.zy.shape != other.zy.shape:
            raise FitError("Gram matrices of different sites do not add up")
        return Gram(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def over_processes(self) -> Gram:
        """Of the samples of all processes of `torch.distributed`; itself where there is one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        count = torch.tensor([self.count], dtype=torch.float64, device=self.z.device)
        sums = [count, *(getattr(self, field.name).clone() for field in fields(self)[1:])]
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
        return Gram(float(sums[0]), *sums[1:])

    def centred(self, intercept: bool = True) -> Centred:
        """Means and second moments; about the means where the fit has an intercept, about 0 where it has none.

        Raises:
            FitError: nothing was seen, or something was not finite.
        """
        if self.count < 2:
            raise FitError(f"{self.count:.0f} positions were seen: too few calibration data to fit anything")
        if not all(bool(t.isfinite().all()) for t in (self.z, self.y, self.zz, self.zy, self.yy)):
            raise FitError("a value is not finite: does the model overflow on the calibration batches?")
        mean_z, mean_y = self.z / self.count, self.y / self.count
        if not intercept:
            mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
        return Centred(
            (self.zz / self.count).addr_(mean_z, mean_z, alpha=-1),
            (self.zy / self.count).addr_(mean_z, mean_y, alpha=-1),
            (self.yy / self.count - mean_y.square()).clamp_min(0),
            mean_z,
            mean_y,
        )


@dataclass(frozen=True)
class Centred:
    """Moments for a least-squares fit y = W (z - mean_z) + mean_y.

    Attributes:
        zz, zy: (n, n) and (n, d) float64.
        yy: (d,) float64, of each output.
        mean_z, mean_y: (n,) and (d,); zero where the fit has no intercept.
    """

    zz: Tensor
    zy: Tensor
    yy: Tensor
    mean_z: Tensor
    mean_y: Tensor


@dataclass(frozen=True)
class Rows:
    """What a site reads and should give.

    Attributes:
        x: (rows, d_in), or (images, d_in, height, width) where the maps are convolutions.
        y: (rows, d) or (images, d, height, width), the consumers' outputs side by side.
    """

    x: Tensor
    y: Tensor

    def chunks(self, width: int) -> Iterator[Rows]:
        """The rows, so many at a time as a hidden tensor of this width allows."""
        each = max(1, self.x[0].numel() // self.x.shape[1]) * width
        for x, y in zip(*(torch.split(t, max(1, _VALUES // each)) for t in (self.x, self.y)), strict=True):
            yield Rows(x, y)

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
        joint: (fit, held) from what the consumers and what the producer read, side by side; `fit`, `held` and `inputs`
            are parts of it. None where `inputs` is.
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
    rows: tuple[Sequence[Rows], Sequence[Rows]] = ((), ())
    units: Tensor | None = None
    positions: float = 0.0

    @classmethod
    def of(cls, fit: Gram, held: Gram, columns: int) -> SiteGrams:
        """Of Gram matrices that go on, behind so many columns, with what the producer reads."""
        if len(fit.z) == columns:
            return cls(fit, held)
        read, given = slice(0, columns), slice(columns, None)
        return cls(fit.part(read), held.part(read), (fit.part(given), held.part(given)), (fit, held))

    @property
    def all(self) -> Gram:
        """All rows."""
        return self.fit + self.held


def may_collapse(site: Site) -> bool:
    """Whether least squares can make one linear map of the site."""
    if any(m.kind == "conv2d" for m in site.maps):
        return False
    return not site.not_linear and site.producer is not None and site.activation is not None and site.calls == 1


def patches(z: Tensor, m: LinearMap, step: int = 1) -> Tensor:
    """What each output position of a map reads: (positions, d_in * taps), the taps of a channel beside one another.

    Args:
        z: in the map's own layout.
        m: the map.
        step: of so many positions one is taken.
    """
    if m.kind != "conv2d":
        return flat(z, False)[::step]
    if m.taps == 1 and m.padding == (0, 0):
        return flat(z[:, :, :: m.stride[0], :: m.stride[1]], True)[::step]
    found, seen = [], 0
    for images in torch.split(z, max(1, _VALUES // max(1, z[0].numel() * m.taps))):
        columns = F.unfold(images, m.kernel, dilation=m.dilation, padding=m.padding, stride=m.stride)
        each = columns.shape[2]
        taken = torch.arange(-seen % step, len(images) * each, step, device=z.device)
        found.append(columns.transpose(1, 2)[taken // each, taken % each])
        seen += len(images) * each
    return torch.cat(found)


def unusual_padding(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a convolution pads its input where a `LinearMap` does not say it: not with zeros, or not evenly."""
    if not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and module.padding != "same"):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return lambda x: F.pad(x, module._reversed_padding_repeated_twice, mode)


def thinned(positions: int, channels: int, taps: int) -> int:
    """Every how many-th position is enough: all tokens, but of a convolution neighbours tell nearly the same."""
    return max(1, positions // (_PER_COLUMN * channels * taps)) if taps > 1 else 1


def flat(t: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels)."""
    if channels_first:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])
