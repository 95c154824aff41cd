"""What calibration data tell about a site's activation: moments, channel by channel, that add up.

    moments = collect(model, sites, batches)            # {site name: Moments}
    slope, offset = moments["encoder.layer.3"].best_affine()

Only sums are kept, in float64, so that memory does not grow with the data, and moments of several batches, data sets or
machines are added.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from itertools import repeat
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.core.inputs import (
    Inputs,
    InputsOf,
    MaskOf,
    call,
    default_inputs_of,
    default_mask_of,
    model_device,
    reiterable,
    tensors,
    to_device,
)
from shallower.core.modes import evaluating
from shallower.errors import FitError, SiteError
from shallower.modules import attachment
from shallower.sites import Site

"""Picks, out of a batch of the user's data, the (batch, positions) mask; 0 where a position counts for nothing."""

_ELEMENTS = 1 << 20
"""Values that are converted to float64 at a time."""


@dataclass(frozen=True)
class Moments:
    """Sums over positions of the input h and the output f = f(h) of an activation, and of u in a gated site.

        total = Moments.of(h, f) + Moments.of(h2, f2)

    Attributes:
        count: positions seen (tokens, pixels); of a distribution, 1.
        h, hh, f, ff, hf: (n,) float64, sums of h, h h, f, f f and h f.
        uu, fuu, ffuu: (n,) float64, sums of u u, f u u and f f u u, where z = f(h) u; None where the site is not gated.
    """

    count: float
    h: Tensor
    hh: Tensor
    f: Tensor
    ff: Tensor
    hf: Tensor
    uu: Tensor | None = None
    fuu: Tensor | None = None
    ffuu: Tensor | None = None

    @classmethod
    def of(cls, h: Tensor, f: Tensor, u: Tensor | None = None) -> Moments:
        """Moments of samples: h, f and u are (positions, n), of any dtype."""
        rows = max(1, _ELEMENTS // max(1, h.shape[1]))
        pieces = zip(
            torch.split(h, rows),
            torch.split(f, rows),
            repeat(None) if u is None else torch.split(u, rows),
            strict=False,
        )
        return reduce(add, (cls._of(*piece) for piece in pieces))

    @classmethod
    def _of(cls, h: Tensor, f: Tensor, u: Tensor | None) -> Moments:
        h, f = h.double(), f.double()
        plain = (float(len(h)), h.sum(0), (h * h).sum(0), f.sum(0), (f * f).sum(0), (h * f).sum(0))
        if u is None:
            return cls(*plain)
        uu = u.double().square()
        return cls(*plain, uu.sum(0), (f * uu).sum(0), (f * f * uu).sum(0))

    @classmethod
    def gaussian(cls, mean: Tensor, std: Tensor, f: Callable[[Tensor], Tensor]) -> Moments:
        """Moments of h ~ N(mean, std^2), channel by channel, without data.

        By the trapezoid rule on 801 points within ten standard deviations: exact to float64 for smooth f, to about 1e-4
        of `std` for f with a kink.

        Args:
            mean, std: (n,), for a BatchNorm before f its shift and the absolute value of its scale.
            f: called with (points, n), float64.
        """
        points = torch.linspace(-10, 10, 801, dtype=torch.float64, device=mean.device)[:, None]
        weights = torch.exp(-points.square() / 2)
        weights = weights / weights.sum()
        h = mean.double() + std.double() * points
        values = f(h).double()
        return cls(1.0, *((weights * t).sum(0) for t in (h, h * h, values, values * values, h * values)))

    def __add__(self, other: Moments) -> Moments:
        """Moments of both samples together."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        if any((a is None) != (b is None) for a, b in pairs) or self.h.shape != other.h.shape:
            raise FitError("moments of different sites do not add up")
        sums: list[Any] = [None if a is None else a + b for a, b in pairs]
        return Moments(*sums)

    @property
    def mean(self) -> Tensor:
        """(n,) mean of h."""
        return self.h / self.count

    @property
    def var(self) -> Tensor:
        """(n,) variance of h, not negative."""
        return (self.hh / self.count - self.mean.square()).clamp_min(0)

    @property
    def std(self) -> Tensor:
        """(n,) standard deviation of h."""
        return self.var.sqrt()

    def best_affine(self) -> tuple[Tensor, Tensor]:
        """Slope and offset, (n,) each, of the affine map that is nearest to f in the mean square.

        Of f(h) where the site is not gated: slope = cov(h, f) / var(h), and the mean is matched. A channel whose h does
        not vary gets slope 0. Of f(h) u where it is gated: slope t = E[f u^2] / E[u^2] on u, offset 0.

        Raises:
            FitError: the moments are not finite, or nothing was seen.
        """
        if self.count == 0 or not all(torch.isfinite(t).all() for t in (self.hh, self.hf, self.f)):
            raise FitError("the moments are not finite: does the model overflow on the calibration batches?")
        mean_f = self.f / self.count
        if self.uu is not None and self.fuu is not None:
            return torch.where(self.uu > 0, self.fuu / self.uu.clamp_min(_TINY), mean_f), torch.zeros_like(mean_f)
        varies = self.var > 1e-12 * self.hh / self.count
        covariance = self.hf / self.count - self.mean * mean_f
        slope = torch.where(varies, covariance / self.var.clamp_min(_TINY), 0.0)
        return slope, mean_f - slope * self.mean

    def error(self, slope: Tensor, offset: Tensor) -> Tensor:
        """(n,) mean squared error of that affine map in the place of f: of f(h), or of f(h) u in a gated site."""
        if self.uu is not None and self.fuu is not None and self.ffuu is not None:
            total = self.ffuu - 2 * slope * self.fuu + slope.square() * self.uu
        else:
            total = (
                self.ff
                + slope.square() * self.hh
                + self.count * offset.square()
                - 2 * slope * self.hf
                - 2 * offset * self.f
                + 2 * slope * offset * self.h
            )
        return (total / self.count).clamp_min(0)


_TINY = torch.finfo(torch.float64).tiny


def gaussian_prelu(mean: Tensor, std: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map nearest to max(h, 0) + a min(h, 0) for h ~ N(mean, std^2), in closed form.

    Slope 1 - (1 - a) Phi(-mean/std); the offset matches the mean, a mean + (1 - a) E[relu(h)]. Where std is 0 the
    slope is 0.

    Args:
        mean, std: (n,), std >= 0.
        a: (1,) or (n,).

    Returns:
        slope and offset, (n,) float64.

    Reference: LayerCollapse, arXiv 2311.17943, for the collapse; the fit is the orthogonal projection on {1, h}.
    """
    mean, std, a = mean.double(), std.double(), a.detach().double()
    varies = std > 0
    z = mean / torch.where(varies, std, 1.0)
    below = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    relu = torch.where(varies, mean * (1 - below) + std * density, mean.clamp_min(0))
    slope = torch.where(varies, 1 - (1 - a) * below, 0.0)
    return slope, a * mean + (1 - a) * relu - slope * mean


def collect(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Any],
    *,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, Moments]:
    """Moments of each site's activation over the batches, by the site's name.

    What stands at the activation's place now is measured: f, or the slope activation that a method has attached. The
    model runs in eval mode without gradients and is left as it was.

    Args:
        model: on the device to compute on; batches are moved there.
        sites: of kinds that have an activation.
        batches: read once here, but a one-shot iterator is refused.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`. It applies to sites that
            see as many positions as the mask has.

    Raises:
        SiteError: a site has no activation, an activation did not run, or the batches cannot be read again.
        FitError: there are no batches.
    """
    sites = tuple(sites)
    reiterable(batches)
    places = []
    for site in sites:
        if site.activation is None:
            raise SiteError(f"{site.name}: a site of kind {site.kind!r} has no activation to measure")
        places.append(site.activation)
    device = model_device(model)
    with attachment.exposed(model, places) as modules, ExitStack() as hooks, evaluating(model):
        watches = [
            hooks.enter_context(_watching(model, site, modules[p])) for site, p in zip(sites, places, strict=True)
        ]
        for batch in tqdm(batches, desc="calibrating", delay=2):
            mask = default_mask_of(batch) if mask_of is None else mask_of(batch)
            for watch in watches:
                watch.mask = None if mask is None else mask.to(device).bool().reshape(-1)
            inputs: Inputs = to_device(inputs_of(batch), device)
            call(model, inputs)
            for watch in watches:
                watch.check()
    return {watch.site.name: watch.result() for watch in watches}


class _Watch:
    """Gathers the moments of one site while the model runs."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.mask: Tensor | None = None
        self.moments: Moments | None = None
        self.entering: deque[Tensor] = deque()
        self.pairs: deque[tuple[Tensor, Tensor]] = deque()
        self.ups: deque[Tensor] = deque()

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The activation's input, copied because f may work in place."""
        self.entering.append(next(tensors((args, kwargs))).detach().clone())

    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """The activation's output."""
        h, f = self.rows(self.entering.pop()), self.rows(next(tensors(output)).detach())
        if self.site.gated:
            self.pairs.append((h, f))
            self.join()
        else:
            self.add(Moments.of(h, f))

    def up(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """What a gated site's producer gives: u, or the gate and u in one tensor."""
        u = self.rows(next(tensors(output)).detach())
        if self.site.packed:
            u = u[:, self.site.width :] if self.site.packed == "gate-first" else u[:, : self.site.width]
        self.ups.append(u)
        self.join()

    def join(self) -> None:
        """Either of the two may come first."""
        while self.pairs and self.ups:
            self.add(Moments.of(*self.pairs.popleft(), self.ups.popleft()))

    def rows(self, t: Tensor) -> Tensor:
        """(positions that count, channels)."""
        if self.site.channels_first and t.dim() > 2:
            t = t.movedim(1, -1)
        t = t.reshape(-1, t.shape[-1])
        return t[self.mask] if self.mask is not None and len(self.mask) == len(t) else t

    def add(self, moments: Moments) -> None:
        self.moments = moments if self.moments is None else self.moments + moments

    def check(self) -> None:
        if self.moments is None or self.pairs or self.ups:
            raise SiteError(
                f"{self.site.name}: its activation and its producer did not run once each on this batch; is this the "
                "model that the sites were found in, and are the batches like the example inputs?"
            )

    def result(self) -> Moments:
        if self.moments is None:
            raise FitError("there are no batches to calibrate on")
        return self.moments


@contextmanager
def _watching(model: nn.Module, site: Site, activation: nn.Module) -> Iterator[_Watch]:
    watch = _Watch(site)
    handles = [
        activation.register_forward_pre_hook(watch.before, with_kwargs=True),
        activation.register_forward_hook(watch.after),
    ]
    if site.gated and site.producer is not None:
        handles.append(model.get_submodule(site.producer.name).register_forward_hook(watch.up))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
