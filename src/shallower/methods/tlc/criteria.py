"""Which activations a network can do without: the distribution of their inputs, and criteria computed from it.

    normals = input_statistics(model, sites, batches)       # from BatchNorm, or measured
    expected_change(normals["layer1.0"], slope, offset, None)       # with a line in the place of a ReLU

References: TLC, arXiv 2412.15077, for the statistics from BatchNorm; EASIER, arXiv 2404.18949, and NEPENTHE,
arXiv 2404.16890, for the entropy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.moments import Moments, collect
from shallower.calibrating.patches import check_mask, flat, flat_mask, unmasked
from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.processes import added, raised_anywhere, summed_over_processes
from shallower.core.text import listing
from shallower.core.watching import read, watching
from shallower.errors import MethodError
from shallower.modules import attachment
from shallower.modules.layers import normal_after
from shallower.sites import Place, Site

Line = Literal["auto", "unit", "best"]


@dataclass(frozen=True)
class Normal:
    """The distribution of an activation's input: h_j ~ N(mean_j, std_j^2).

    Attributes:
        mean, std: (n,) float64, std >= 0.
        source: BatchNorm's shift and scale, or measured on calibration batches.
        moments: with those of f(h): measured, or under the normal distribution.
    """

    mean: Tensor
    std: Tensor
    source: Literal["batchnorm", "measured"]
    moments: Moments


def input_statistics(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Any] | None = None,
    *,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, Normal]:
    """The distribution of each activation's input: from the BatchNorm in front of it, without data, or else measured.

    A BatchNorm counts only if its output is the activation's input: behind a residual sum it says nothing.

    Args:
        model: what stands at a site's place now is taken for f.
        sites: that have an activation.
        batches: read only where a site has no BatchNorm; see `calibrating.moments.collect`, also for the rest.

    Raises:
        MethodError: a site has no BatchNorm, and there are no batches.
    """
    sites = tuple(sites)
    found: dict[str, Normal] = {}
    open_ = []
    for site in sites:
        normal = batchnorm_statistics(model, site)
        if normal is None:
            open_.append(site)
        else:
            found[site.name] = normal
    if open_ and batches is None:
        names = listing([site.name for site in open_], 4)
        raise MethodError(
            f"no BatchNorm feeds the activation of {names}: use batches= to measure on, a few hundred samples"
        )
    if open_ and batches is not None:
        measured = collect(model, open_, batches, inputs_of=inputs_of, mask_of=mask_of)
        for name, moments in measured.items():
            found[name] = Normal(moments.mean.cpu(), moments.std.cpu(), "measured", moments)
    return {site.name: found[site.name] for site in sites}


def batchnorm_statistics(model: nn.Module, site: Site) -> Normal | None:
    """Mean beta and deviation |gamma|, if a BatchNorm feeds the site's activation; of a gated site nothing is known."""
    norm = site.bridge.norm_before
    if not norm or site.bridge.gated or site.activation is None:
        return None
    normal = normal_after(model.get_submodule(norm))
    if normal is None:
        return None
    mean, std = normal
    with attachment.exposed(model, [site.activation]) as modules, torch.no_grad():
        f = copy.deepcopy(modules[site.activation]).cpu().double().eval()
        return Normal(mean, std, "batchnorm", Moments.gaussian(mean, std, f))


def lines(site: Site, normal: Normal, rule: Line) -> tuple[Tensor, Tensor]:
    """The line slope * h + offset that takes the place of f, channel by channel, (n,) float64 each.

    "unit" is TLC's: channels whose input is positive on average pass as they are, the others become 0. (Where the mean
    is 0 and the input varies both are as wrong, and the channel passes: a BatchNorm that was never trained would lose
    all of them otherwise.) "best" is nearest to f in the mean square; in front of zero padding, where no constant may
    stand, the nearest through the origin. At an activation place the only line is the identity. A gate becomes a
    constant: slope is its value. "auto" is "unit" where a BatchNorm tells how the input lies, and "best" where it was
    measured: of a GELU's inputs nearly all means are negative, and "unit" would drop the whole site.
    """
    ones = torch.ones_like(normal.mean)
    if site.kind == "activation":
        return ones, torch.zeros_like(ones)
    unit = rule == "unit" or (rule == "auto" and normal.source == "batchnorm")
    if unit and not site.bridge.gated:
        passes = (normal.mean > 0) | ((normal.mean == 0) & (normal.std > 0))
        return passes.double(), torch.zeros_like(ones)
    slope, offset = (t.cpu() for t in normal.moments.best_affine())
    if all(c.padding == (0, 0) for c in site.consumers) or site.bridge.gated:
        return slope, offset
    hh, hf = normal.moments.hh.cpu(), normal.moments.hf.cpu()
    return torch.where(hh > 0, hf / hh.clamp_min(torch.finfo(hh.dtype).tiny), 0.0), torch.zeros_like(offset)


def sign_probability(normal: Normal) -> Tensor:
    """(n,) P(h <= 0) under the normal distribution: Phi(-mean / std), and 1[mean <= 0] where std is 0."""
    varies = normal.std > 0
    standard = normal.mean / torch.where(varies, normal.std, 1.0)
    return torch.where(varies, torch.special.ndtr(-standard), (normal.mean <= 0).double())


def expected_change(normal: Normal, slope: Tensor, offset: Tensor, f: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(n,) E |f(h) - slope h - offset| under the normal distribution.

    Of a ReLU (f is None) with slope 1 or 0 and no offset in closed form: |gamma| phi(b) - beta Phi(-b) where it
    becomes the identity and |gamma| phi(b) + beta Phi(b) where it becomes 0, with b = beta / |gamma|. Otherwise by the
    trapezoid rule.

    Reference: TLC, arXiv 2412.15077, section 3, for the distribution.
    """
    plain = bool(((slope == 0) | (slope == 1)).all()) and not bool(offset.any())
    if f is None and plain:
        varies = normal.std > 0
        b = normal.mean / torch.where(varies, normal.std, 1.0)
        density = torch.where(varies, torch.exp(-b.square() / 2) / math.sqrt(2 * math.pi), 0.0)
        above = 1 - sign_probability(normal)
        positive = normal.std * density + normal.mean * above
        return torch.where(slope == 1, positive - normal.mean, positive)
    points = torch.linspace(-10, 10, 2001, dtype=torch.float64)[:, None]
    weights = torch.exp(-points.square() / 2)
    h = normal.mean + normal.std * points
    answers = torch.relu(h) if f is None else f(h)
    change = (answers - slope * h - offset).abs()
    mean: Tensor = (weights / weights.sum() * change).sum(0)
    return mean


@torch.no_grad()
def relative_change(site: Site, normal: Normal, rule: Line, f: Callable[[Tensor], Tensor] | None) -> float:
    """Expected change of a site's activation if the line takes its place, relative to the activation's expected size.

    Summed over the channels; f as `expected_change` takes it. In a gated site it is the gate's.
    """
    slope, offset = lines(site, normal, rule)
    nothing = torch.zeros_like(slope)
    if site.bridge.gated:
        slope, offset = nothing, slope
    change = expected_change(normal, slope, offset, f).sum()
    size = expected_change(normal, nothing, nothing, f).sum()
    return float(change / size.clamp_min(torch.finfo(size.dtype).tiny))


def binary_entropy(probability: Tensor) -> Tensor:
    """-p log2 p - (1 - p) log2 (1 - p), between 0 and 1; 0 at both ends."""
    both = torch.stack([probability, 1 - probability]).double()
    entropy: Tensor = -torch.special.xlogy(both, both).sum(0) / math.log(2)
    return entropy


def sign_entropies(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Any],
    *,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, float]:
    """Mean binary entropy of the sign of each site's h over its channels, measured on the batches.

    0 where every channel is always on one side of zero, so that a ReLU does nothing that a line would not do. Of
    several processes all call it, each with batches of its own, and all get the entropies over all of them.

    Args:
        model, sites, batches, inputs_of, mask_of: as `calibrating.moments.collect` takes them.

    Raises:
        MethodError: there are no batches.
        FitError: a mask is of other positions.

    Reference: EASIER, arXiv 2404.18949, and NEPENTHE, arXiv 2404.16890.
    """
    counts: dict[Place, _Signs] = {}
    named: dict[str, Place] = {}
    for site in sites:
        if site.activation is not None:
            named[site.name] = site.activation
            counts[site.activation] = _Signs(site.bridge.dim)
    device = model_device(model)
    with raised_anywhere(), ExitStack() as stack:
        calibration = Batches.read(batches, inputs_of, mask_of)
        modules = stack.enter_context(attachment.exposed(model, list(counts)))
        stack.enter_context(evaluating(model))
        stack.enter_context(watching(modules, before=counts))
        for batch in tqdm(calibration, desc="entropies", delay=2):
            here = batch.on(device)
            rows: set[int] = set()
            for count in counts.values():
                count.mask, count.rows = flat_mask(here.mask), rows
            call(model, here.inputs)
            check_mask(here, rows)
    found: dict[str, float] = {}
    for name, place in named.items():
        (total,) = summed_over_processes(counts[place].total)
        positive = added(counts[place].positive)
        if positive is None or not total:
            raise MethodError("the entropy needs data: `batches` is empty. Use a few hundred samples")
        found[name] = float(binary_entropy(positive / total).mean())
    return found


class _Signs:
    """Counts, channel by channel, how often an activation's input is positive."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.mask: Tensor | None = None
        self.rows: set[int] = set()
        self.positive: Tensor | None = None
        self.total = 0

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = flat(read(args, kwargs).detach(), self.dim == 1)
        self.rows.add(len(h))
        h = unmasked(h, self.mask)
        positive = (h > 0).sum(0, dtype=torch.float64)
        if self.positive is not None:
            positive += self.positive
        self.positive = positive
        self.total += len(h)
