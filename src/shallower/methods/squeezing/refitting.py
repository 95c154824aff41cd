"""One site squeezed: which channels stay, and what its consumers become, from Gram matrices alone.

entry = narrowed_fit(site, grams, metric, width=384)
curve = error_curve(site, grams, metric)                # {width: error}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Centred, Gram, ridge_error
from shallower.calibrating.metrics import Metric
from shallower.calibrating.selection import Elimination, columns_of
from shallower.calibrating.site_grams import SiteGrams, may_collapse
from shallower.core.processes import summed_over_processes
from shallower.errors import FitError
from shallower.methods.squeezing.linear_paths import PathGains, eliminate_beyond, path, path_gains
from shallower.methods.squeezing.reconstruction import Reconstruction, reconstruct
from shallower.methods.squeezing.site_layers import SiteLayers
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.sites import Site

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Ridges that held-out rows choose from, relative to the mean diagonal."""

_SELECTION_RIDGE = 1e-4
_OUTPUT_DAMPING = 1e-2
_DAMPING_OF_IMAGES = 1.0
"""Shares of plain size in the weight of errors; large where positions tell nearly the same, and the rest is noisy."""

_LEAST = 1e-4

_TRIALS = 2
"""Splits into channels and a linear path that are tried on held-out rows."""

_PARTS = 8
_LICENCE = 1.5
_NEGLIGIBLE = 1e-3
"""A width is offered if there its error on held-out rows is at most so many times that on rows for fitting, or this
part of the variance; tried at so many parts of the site's width."""

_EQUATIONS = 16
"""Outputs seen for each number to be fitted, below which producers stay as they are: what fits the calibration data
better, and held-out data like them, then takes other data farther from the dense network."""


def metric_of(site: Site, metrics: Mapping[str, Centred], grams: SiteGrams) -> Metric:
    """The weight of errors at the consumers' outputs, one beside the other.

    What the model's output makes of them (see `fisher.py`), and to a part their size in the residual stream.
    """
    found = [metrics[m.name] for m in site.consumers if m.name in metrics]
    units = grams.units
    if units is None:
        units = torch.ones(grams.fit.outputs)
    plain = units.to(grams.fit.device, torch.float64).square()
    plain = plain + _LEAST * plain.mean().clamp_min(_LEAST)
    if len(found) < len(site.consumers) or not any(bool(block.squares.any()) for block in found):
        moments = _moments(site, grams)
        return Metric(plain / (moments.yy * plain).sum().clamp_min(torch.finfo(torch.float64).tiny))
    damping = _OUTPUT_DAMPING
    if site.consumers[0].taps > 1:
        damping = _DAMPING_OF_IMAGES
    size = torch.cat([block.squares for block in found]).mean()
    return Metric(damping * size / plain.mean() * plain, tuple(found))


@dataclass(frozen=True)
class _Choice:
    """What the consumers are to read: channels that stay, and perhaps a linear path beside them.

    Attributes:
        kept: (k,) int64.
        down: (rank, d_in), or None.
        seen: Gram matrices of these columns, for fitting and held out.
        ridge: with the least error on held-out rows.
        error: that error, as a part of the variance there; with `found`, what is left of it.
        found: the site with its producers fitted too, where that helps.
    """

    kept: Tensor
    down: Tensor | None
    seen: tuple[Gram, Gram]
    ridge: float
    error: float
    found: Reconstruction | None = None

    @classmethod
    def of(cls, site: Site, grams: SiteGrams, metric: Metric, kept: Tensor, down: Tensor | None = None) -> _Choice:
        """With the ridge that held-out rows choose."""
        pair = (grams.fit, grams.held)
        if grams.joint is not None and down is not None:
            pair = grams.joint
        columns, n = columns_of(kept, site.columns_each), grams.fit.columns
        seen = (pair[0].through(columns, n, down), pair[1].through(columns, n, down))
        return cls(kept, down, seen, *best_ridge(site, seen, metric))


def narrowed_fit(
    site: Site, grams: SiteGrams, metric: Metric, width: int, small: nn.Module | None = None, *, paths: int = 0
) -> Entry:
    """Keep this many channels, and fit the consumers to them; with `small`, the producers too where that helps.

    With `paths`, fewer channels stay and a linear path stands beside them, together at no higher cost, where held-out
    rows say that this is better.

    Args:
        site: to be narrowed.
        grams: with rows, if the producers are to be fitted; with `joint`, if there may be a path.
        metric: weight of errors, see `metric_of`.
        width: channels that stay, or what costs as much.
        small: the model with the earlier sites squeezed and this one as it was.
        paths: the rank of a path, and the number of channels beside it, are multiples of this; 0 for no path.

    Raises:
        FitError: the calibration data are too few or not finite.
    """
    moments = _moments(site, grams)
    taps = site.columns_each
    kept = metric.elimination(moments, ridge=_SELECTION_RIDGE, keep=width, taps=taps).kept(width)
    choices = [_Choice.of(site, grams, metric, kept)]
    if paths and (other := _with_path(site, grams, metric, width, paths)) is not None:
        choices.append(other)
    if small is not None:
        choices = [_with_producers(small, site, grams, choice, metric) for choice in choices]
    best = min(choices, key=lambda choice: choice.error)
    return Entry.narrow(site, best.kept.cpu(), fit=_fit(site, best), error=_reported(best.error))


def collapsed_fit(site: Site, grams: SiteGrams, metric: Metric) -> Entry:
    """One linear map from what the producer reads to what the consumers should give."""
    if grams.inputs is None:
        raise FitError("a full collapse needs Gram matrices of what the producer reads")
    ridge, error = best_ridge(site, grams.inputs, metric)
    moments = (grams.inputs[0] + grams.inputs[1]).centred(has_intercept(site))
    weight = moments.fit(ridge)
    weights, biases = _by_consumer(site, weight, moments.mean_y - weight @ moments.mean_z, 0)
    n = site.width
    return Entry(
        site,
        torch.full((n,), int(Fate.LINEAR), dtype=torch.int8),
        torch.ones(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        fit=Fit((), biases, None, weights),
        error=_reported(error),
    )


def error_curve(site: Site, grams: SiteGrams, metric: Metric, *, paths: int = 0) -> dict[int, float]:
    """The error at every width, in units of `metric`; at width 0, of a full collapse, where `grams` has the inputs.

    As held-out rows have it, where these say more than the rows for fitting: a width at which they say much more has
    too few rows for what is fitted there, and is left out. With `paths` (see `narrowed_fit`), at each width the error
    of the best split into channels and a linear path.
    """
    elimination = metric.elimination(_moments(site, grams), ridge=_SELECTION_RIDGE, keep=0, taps=site.columns_each)
    whole = elimination.error(0)
    found = None
    if paths:
        found = _paths(site, grams, metric)
    excess = _excess(site, grams, metric, elimination)
    curve: dict[int, float] = {}
    for k in range(1, site.width + 1):
        if k < site.width and excess[k] > _LICENCE:
            continue
        error = elimination.error(k) * max(1.0, float(excess[k]))
        if found is not None:
            error = max(0.0, min(error, found[1].best(k, paths)[2]))
        curve[k] = damage(error, whole)
    if grams.inputs is not None and may_collapse(site):
        _, error = best_ridge(site, grams.inputs, metric)
        if math.isfinite(error):
            curve[0] = damage(error * whole, whole)
    return curve


def _excess(site: Site, grams: SiteGrams, metric: Metric, elimination: Elimination) -> Tensor:
    """(n + 1,) how many times the error of the fitting rows the held-out rows have at each width.

    Measured at eighths of the width and linear in between. An error too small to matter counts as none.
    """
    n, intercept = site.width, has_intercept(site)
    widths, ratios = [0], [1.0]
    for width in sorted({n * part // _PARTS for part in range(1, _PARTS)} - {0}):
        choice = _Choice.of(site, grams, metric, elimination.kept(width))
        if math.isfinite(choice.error):
            fitted = choice.seen[0].centred(intercept)
            widths.append(width)
            ratios.append(choice.error / max(_part_left(fitted, fitted, choice.ridge, metric), _NEGLIGIBLE))
    known, found, every = torch.tensor(widths), torch.tensor(ratios), torch.arange(n + 1)
    above = torch.searchsorted(known, every).clamp(max=len(widths) - 1)
    below = (above - 1).clamp(min=0)
    part = ((every - known[below]) / (known[above] - known[below]).clamp(min=1)).clamp(0, 1)
    return torch.lerp(found[below], found[above], part)


def damage(error: float, whole: float) -> float:
    """An error as the sites' budgets see it: for small ones the error itself, without bound where all is lost.

    The second-order estimate is right for small errors only: a site that loses most of what it says costs more, and
    without this the knapsack takes all from a few sites.
    """
    if not whole > 0:
        return 0.0
    return error / max(1 - error / whole, 1e-6)


def has_intercept(site: Site) -> bool:
    """Whether the fit has an intercept: always at convolutions; elsewhere where the consumer has a bias to hold it.

    A bias that was not there would keep the stock class from loading the result.
    """
    return all(c.bias or c.kind != "linear" for c in site.consumers)


def _moments(site: Site, grams: SiteGrams) -> Centred:
    try:
        return grams.all.centred(has_intercept(site))
    except FitError as error:
        raise FitError(f"{site.name}: {error}") from error


def may_have_path(site: Site) -> bool:
    """Whether a linear path can stand beside kept channels: every map is a matrix, and all see the same positions."""
    if site.producer is None or site.bridge.not_linear is not None or not site.bridge.direct:
        return False
    return all(m.taps == 1 and m.groups == 1 and m.stride == (1, 1) and m.padding == (0, 0) for m in site.maps)


def price_of_path(site: Site) -> float:
    """What a channel of a linear path costs, where a kept channel costs 1: less beside a gate that is its own layer."""
    if site.gate is None or site.producer is None:
        return 1.0
    others = site.producer.d_in + sum(c.d_out for c in site.consumers)
    weights = others / (others + site.gate.d_in)
    params = (others + site.producer.bias) / (others + site.producer.bias + site.gate.d_in + site.gate.bias)
    return max(weights, params)


def _with_path(site: Site, grams: SiteGrams, metric: Metric, width: int, paths: int) -> _Choice | None:
    """The best of some splits into channels and a path by held-out error; None where no rank takes error away.

    The rank that is best by all rows, and the best that is at most half of it, since a path fits more numbers than the
    channels in whose place it stands. For the comparison paths are found without the held-out rows.
    """
    found = _paths(site, grams, metric)
    if found is None or grams.joint is None:
        return None
    elimination, gains = found
    n, root, intercept = elimination.channels, metric.root, has_intercept(site)
    best: _Choice | None = None
    most = len(root)
    for _ in range(_TRIALS):
        k, rank, _ = gains.best(width, paths, most)
        if rank == 0:
            break
        kept, most = elimination.kept(k), rank // 2
        down = path(grams.joint[0].centred(intercept), n, kept, rank, root, ridge=_SELECTION_RIDGE)
        trial = _Choice.of(site, grams, metric, kept, down)
        if best is None or trial.error < best.error:
            best = trial
    if best is None or best.down is None:
        return None
    fit, held = grams.joint
    down = path((fit + held).centred(intercept), n, best.kept, len(best.down), root, ridge=_SELECTION_RIDGE)
    return replace(best, down=down, seen=(fit.through(best.kept, n, down), held.through(best.kept, n, down)))


def _paths(site: Site, grams: SiteGrams, metric: Metric) -> tuple[Elimination, PathGains] | None:
    """Which channels stay beside a path, and what a path does then; None where there can be none."""
    if grams.joint is None or not may_have_path(site):
        return None
    moments, root = (grams.joint[0] + grams.joint[1]).centred(has_intercept(site)), metric.root
    elimination = eliminate_beyond(moments, site.width, root, ridge=_SELECTION_RIDGE)
    return elimination, path_gains(moments, elimination, root, ridge=_SELECTION_RIDGE, price=price_of_path(site))


def enough_for_producers(site: Site, kept: int, positions: float) -> bool:
    """Whether so many rows are enough to fit the producers' rows of so many channels too."""
    made = [m for m in (site.producer, site.gate) if m is not None]
    if not made:
        return False
    columns = sum(m.d_in * m.taps * (1 + site.bridge.packed) for m in made)
    d = sum(m.d_out for m in site.consumers)
    return positions * d >= _EQUATIONS * kept * (columns + d * site.columns_each)


def _with_producers(small: nn.Module, site: Site, grams: SiteGrams, choice: _Choice, metric: Metric) -> _Choice:
    """With the producers fitted too; as it was where that cannot be done, is not to be trusted or does not help."""
    fit, held = grams.rows
    layers = SiteLayers.of(small, site, choice.kept, choice.down)
    if layers is None:
        return choice
    # all processes decide alike: one may have no rows of its own, and takes part in the others' sums
    seen, outside = summed_over_processes(sum(r.positions for r in fit), sum(r.positions for r in held))
    if not outside or not enough_for_producers(site, len(choice.kept), seen):
        return choice
    found = reconstruct(layers, fit, held, metric.root, ridge=choice.ridge, intercept=has_intercept(site))
    if not found.after < found.before:
        return choice
    return replace(choice, found=found, error=choice.error * found.after / found.before)


def _fit(site: Site, choice: _Choice) -> Fit:
    """Consumers fitted to what a choice lets them read; or what was found with the producers fitted too."""
    found = choice.found
    if found is None:
        read = (choice.seen[0] + choice.seen[1]).centred(has_intercept(site))
        weight = read.fit(choice.ridge)
        bias = read.mean_y - weight @ read.mean_z
    else:
        weight, bias = found.weight, found.bias
    kept, taps, down = len(choice.kept), site.columns_each, choice.down
    fit = Fit(*_by_consumer(site, weight[:, : kept * taps], bias, kept))
    if down is not None:
        ups, _ = _by_consumer(site, weight[:, kept * taps :], bias, len(down))
        down = down.cpu()
        if site.consumers[0].kind == "conv2d":
            down = down[:, :, None, None]
        fit = replace(fit, down=down, ups=ups)
    if found is not None:
        fit = found.added_to(fit)
    return fit


def _reported(error: float) -> float | None:
    """What the held-out rows say; None where there were none."""
    if not math.isfinite(error):
        return None
    return error


def best_ridge(site: Site, pair: tuple[Gram, Gram], metric: Metric) -> tuple[float, float]:
    """The ridge with the least error on held-out rows, and that error as a part of the variance there."""
    intercept = has_intercept(site)
    if pair[0].count < 2 or pair[1].count < 2:
        return RIDGES[-1], float("inf")
    fit, held = pair[0].centred(intercept), pair[1].centred(intercept)
    best, least = RIDGES[-1], float("inf")
    for ridge in RIDGES:
        try:
            error = _part_left(fit, held, ridge, metric)
        except FitError:
            continue
        if error < least:
            best, least = ridge, error
    return best, least


def _part_left(fit: Centred, held: Centred, ridge: float, metric: Metric) -> float:
    """The error on `held` of the ridge fit to `fit`, as a part of the variance there."""
    error = ridge_error(fit, held, ridge, metric.diagonal)
    variance = float((held.yy * metric.diagonal).sum())
    if not variance > 0:
        return 0.0
    return error / variance


def _by_consumer(site: Site, weight: Tensor, bias: Tensor, width: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    sizes = [c.d_out for c in site.consumers]
    weights = []
    for c, part in zip(site.consumers, torch.split(weight.cpu(), sizes), strict=True):
        if c.kind == "conv2d" and width:
            part = part.reshape(c.d_out, width, *c.kernel)
        weights.append(part)
    return tuple(weights), tuple(map(torch.clone, torch.split(bias.cpu(), sizes)))
