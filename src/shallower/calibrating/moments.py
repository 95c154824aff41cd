"""Moments of a site's activation over calibration data, channel by channel, that add up.

    moments = collect(model, sites, batches)            # {site name: Moments}
    slope, offset = moments["encoder.layer.3"].best_affine()

Only sums are kept, in float64, so that memory does not grow with the data, and moments of several batches, data sets or
machines are added.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import reduce
from itertools import repeat
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.patches import check_mask, flat, flat_mask, unmasked
from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.processes import added, raised_anywhere
from shallower.core.tensors import are_finite
from shallower.core.trees import tensors, to_device
from shallower.core.watching import After, Before, copied, read, watching
from shallower.errors import FitError, SiteError
from shallower.modules import attachment
from shallower.sites import Place, Site

_WIDE_VALUES = 1 << 20
"""Values that are converted to float64 at a time."""

Key = tuple[int, str]
"""Number of a site, and "activation" or "up"."""


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
        rows = max(1, _WIDE_VALUES // max(1, h.shape[1]))
        ups: Iterable[Tensor | None] = repeat(None)
        if u is not None:
            ups = torch.split(u, rows)
        return reduce(add, map(cls._of, torch.split(h, rows), torch.split(f, rows), ups))

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
        unlike = self.h.shape != other.h.shape
        sums: list[Any] = []
        for field in fields(self):
            total, further = getattr(self, field.name), getattr(other, field.name)
            if unlike or (total is None) != (further is None):
                raise FitError("moments of different sites do not add up")
            if total is not None:
                total = total + further
            sums.append(total)
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
        if self.count == 0 or not are_finite((self.hh, self.hf, self.f)):
            raise FitError("the moments are not finite: does the model overflow on the calibration batches?")
        mean_f = self.f / self.count
        if self.uu is not None and self.fuu is not None:
            return torch.where(self.uu > 0, self.fuu / self.uu.clamp_min(_SMALLEST), mean_f), torch.zeros_like(mean_f)
        # beside E[h^2] a variance that small is what rounding leaves of none
        varies = self.var > 1e-12 * self.hh / self.count
        covariance = self.hf / self.count - self.mean * mean_f
        slope = torch.where(varies, covariance / self.var.clamp_min(_SMALLEST), 0.0)
        return slope, mean_f - slope * self.mean

    def error(self, slope: Tensor, offset: Tensor) -> Tensor:
        """(n,) mean squared error of that affine map in the place of f: of f(h), or of f(h) u in a gated site."""
        if self.uu is not None and self.fuu is not None and self.ffuu is not None:
            # the mean of (f u - slope u)^2
            total = self.ffuu - 2 * slope * self.fuu + slope.square() * self.uu
        else:
            # the mean of (f - slope h - offset)^2
            total = (
                self.ff
                + slope.square() * self.hh
                + self.count * offset.square()
                - 2 * slope * self.hf
                - 2 * offset * self.f
                + 2 * slope * offset * self.h
            )
        return (total / self.count).clamp_min(0)


_SMALLEST = torch.finfo(torch.float64).tiny


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
    # E[max(h, 0)] = mean Phi(mean / std) + std phi(mean / std)
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

        slope, offset = collect(model, sites, batches)["encoder.layer.3"].best_affine()

    What is at the activation's place now is measured: f, or the slope activation that a method has attached. The model
    runs in eval mode without gradients and is left as it was. A batch in which a site sees no rows counts for nothing
    there. Of several processes all call it, each with batches of its own, and all get the sums over all of them.

    Args:
        model: on the device to compute on; batches are moved there.
        sites: those without an activation are left out.
        batches: a list, a DataLoader, or `Batches` that were read before.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`. It applies to sites that
            see as many positions as the mask has.

    Raises:
        SiteError: a site has no activation, an activation did not run, or the batches cannot be read.
        FitError: there are no batches, or `mask_of` returns a mask that fits none of the sites. What one process
            raises, all raise.
    """
    device = model_device(model)
    with raised_anywhere(), ExitStack() as stack:
        calibration = Batches.read(batches, inputs_of, mask_of)
        recorders = [_ActivationRecorder(site) for site in sites if site.activation is not None]
        modules = stack.enter_context(attachment.exposed(model, [recorder.place for recorder in recorders]))
        stack.enter_context(evaluating(model))
        watched, before, after = _hooks(model, modules, recorders)
        stack.enter_context(watching(watched, before=before, after=after))
        for batch in tqdm(calibration, desc="calibrating", delay=2):
            here, rows = batch.on(device), set[int]()
            for recorder in recorders:
                recorder.begin(here.mask, rows)
            call(model, here.inputs)
            for recorder in recorders:
                recorder.check()
            check_mask(here, rows)
    found: dict[str, Moments] = {}
    for recorder in recorders:
        moments = added(recorder.moments)
        if moments is None:
            raise FitError("calibration needs data: `batches` is empty. Give a few hundred samples")
        found[recorder.site.name] = to_device(moments, device)
    return found


def _hooks(
    model: nn.Module, modules: Mapping[Place, nn.Module], recorders: Sequence[_ActivationRecorder]
) -> tuple[dict[Key, nn.Module], dict[Key, Before], dict[Key, After]]:
    """The modules to watch, and what to call before and after them."""
    watched: dict[Key, nn.Module] = {}
    before: dict[Key, Before] = {}
    after: dict[Key, After] = {}
    for i, recorder in enumerate(recorders):
        activation, up = (i, "activation"), (i, "up")
        watched[activation] = modules[recorder.place]
        before[activation], after[activation] = recorder.before, recorder.after
        if recorder.site.bridge.gated and recorder.site.producer is not None:
            watched[up] = model.get_submodule(recorder.site.producer.name)
            after[up] = recorder.up
    return watched, before, after


class _ActivationRecorder:
    """Adds up the moments of one site's activation while the model runs.

    Attributes:
        place: where the activation is.
        mask: positions that count in the batch that runs; None for all.
        rows: how many positions the calls of sites have in that batch.
        moments: the sums; None before anything was seen.
    """

    def __init__(self, site: Site) -> None:
        if site.activation is None:
            raise SiteError(f"{site.name}: a site of kind {site.kind!r} has no activation to measure")
        self.site = site
        self.place = site.activation
        self.begin(None, set())
        self.moments: Moments | None = None
        self._entering: deque[Tensor] = deque()
        self._pairs: deque[tuple[Tensor, Tensor]] = deque()
        self._ups: deque[Tensor] = deque()

    def begin(self, mask: Tensor | None, rows: set[int]) -> None:
        """A batch is about to run; `rows` gets how many positions the calls have."""
        self.mask = flat_mask(mask)
        self.rows = rows

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The activation's input, copied because f may work in place."""
        self._entering.append(copied(read(args, kwargs)))

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """The activation's output."""
        h, f = self._rows(self._entering.pop()), self._rows(next(tensors(output)).detach())
        if self.site.bridge.gated:
            self._pairs.append((h, f))
            self._join()
        else:
            self._add(Moments.of(h, f))

    def up(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """The output of a gated site's producer: u, or the gate and u in one tensor."""
        u = self._rows(next(tensors(output)).detach())
        if self.site.bridge.packed:
            u = u[:, self.site.bridge.up_rows(torch.arange(self.site.width))]
        self._ups.append(u)
        self._join()

    def _join(self) -> None:
        """Either of the two may come first."""
        while self._pairs and self._ups:
            self._add(Moments.of(*self._pairs.popleft(), self._ups.popleft()))

    def _rows(self, t: Tensor) -> Tensor:
        """(positions that count, channels)."""
        t = flat(t, self.site.bridge.image and t.dim() > 2)
        if len(t):
            self.rows.add(len(t))
        return unmasked(t, self.mask)

    def _add(self, moments: Moments) -> None:
        if self.moments is not None:
            moments = self.moments + moments
        self.moments = moments

    def check(self) -> None:
        """Refuse a batch in which the activation and the producer did not run alike."""
        if self.moments is None or self._pairs or self._ups:
            raise SiteError(
                f"{self.site.name}: its activation and its producer did not run once each on this batch; is this the "
                "model that the sites were found in, and are the batches like the example inputs?"
            )
