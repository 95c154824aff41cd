"""One site squeezed: which channels stay, and what its consumers become, from Gram matrices alone.

entry = narrowed(site, grams, metric, width=384)
curve = error_curve(site, grams, metric)                # {width: error}
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shallower.calibration import Centred, Gram, SiteGrams, may_collapse
from shallower.errors import FitError
from shallower.plan import Entry, Fate, Fit
from shallower.reconstruction import Layers, Reconstruction, over_processes, reconstruct
from shallower.selection import columns_of, eliminate, fit_error, ridge_fit
from shallower.sites import Site

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Ridges that held-out rows choose from, relative to the mean diagonal."""

_SELECTION_RIDGE = 1e-4
_DAMPING = 1e-2
_DAMPING_OF_IMAGES = 1.0
"""Shares of plain size in the weight of errors; large where positions tell nearly the same, and the rest is noisy."""

_LEAST = 1e-4

_EQUATIONS = 16
"""Outputs seen for each number to be fitted, below which producers stay as they are: what fits the calibration data
better, and held-out data like them, then takes other data farther from the dense network."""


def metric_of(site: Site, metrics: Mapping[str, Tensor], grams: SiteGrams) -> Tensor:
    """(d, d) float64, positive definite: the weight of errors at the consumers' outputs, one beside the other.

    What the model's output makes of them (see `fisher.py`), and to a part their size in the residual stream.
    """
    found = [metrics[m.name] for m in site.consumers if m.name in metrics]
    d = len(grams.fit.yy)
    units = torch.ones(d) if grams.units is None else grams.units
    plain = torch.diag(units.to(grams.fit.yy).square())
    plain += _LEAST * plain.diagonal().mean().clamp_min(_LEAST) * torch.eye(d).to(plain)
    if len(found) < len(site.consumers) or all(bool((t == 0).all()) for t in found):
        moments = _moments(site, grams)
        scale = 1.0 / (moments.yy * plain.diagonal()).sum().clamp_min(torch.finfo(torch.float64).tiny)
        return scale * plain
    metric: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]
    damping = _DAMPING_OF_IMAGES if site.consumers[0].taps > 1 else _DAMPING
    return metric + damping * metric.diagonal().mean() / plain.diagonal().mean() * plain


def narrowed(site: Site, grams: SiteGrams, metric: Tensor, width: int, small: nn.Module | None = None) -> Entry:
    """Keep this many channels, and fit the consumers to them; with `small`, the producers too where that helps.

    Args:
        site: to be narrowed.
        grams: with rows, if the producers are to be fitted.
        metric: weight of errors, see `metric_of`.
        width: channels that stay.
        small: the model with the earlier sites squeezed and this one as it was.

    Raises:
        FitError: the calibration data are too few or not finite.
    """
    moments = _moments(site, grams)
    taps = site.consumers[0].taps
    root = _root(metric)
    kept = eliminate(moments.zz, moments.zy @ root, ridge=_SELECTION_RIDGE, keep=width, taps=taps).kept(width)
    columns = columns_of(kept, taps)
    ridge, error = _best_ridge(site, (grams.fit, grams.held), metric, columns)
    found = None if small is None else _reconstructed(small, site, grams, kept, root, ridge)
    if found is not None:
        fit = found.added_to(Fit(*_by_consumer(site, found.weight, found.bias, width)))
        error *= found.after / found.before
    else:
        weight = ridge_fit(moments.zz[columns][:, columns], moments.zy[columns], ridge)
        bias = moments.mean_y - weight @ moments.mean_z[columns]
        fit = Fit(*_by_consumer(site, weight, bias, width))
    return Entry.narrow(site, kept.cpu(), fit=fit, note=_note(error))


def collapsed(site: Site, grams: SiteGrams, metric: Tensor) -> Entry:
    """One linear map from what the producer reads to what the consumers should give."""
    if grams.inputs is None:
        raise FitError("a full collapse needs Gram matrices of what the producer reads")
    ridge, error = _best_ridge(site, grams.inputs, metric, None)
    moments = (grams.inputs[0] + grams.inputs[1]).centred(_intercept(site))
    weight = ridge_fit(moments.zz, moments.zy, ridge)
    weights, biases = _by_consumer(site, weight, moments.mean_y - weight @ moments.mean_z, 0)
    n = site.width
    return Entry(
        site,
        torch.full((n,), int(Fate.LINEAR), dtype=torch.int8),
        torch.ones(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        fit=Fit((), biases, None, weights),
        note=_note(error),
    )


def error_curve(site: Site, grams: SiteGrams, metric: Tensor) -> dict[int, float]:
    """The error at every width, in units of `metric`; at width 0, of a full collapse, where `grams` has the inputs."""
    moments = _moments(site, grams)
    zy = moments.zy @ _root(metric)
    elimination = eliminate(moments.zz, zy, ridge=_SELECTION_RIDGE, keep=0, taps=site.consumers[0].taps)
    whole = elimination.error(0)
    curve = {k: _damage(elimination.error(k), whole) for k in range(1, site.width + 1)}
    if grams.inputs is not None and may_collapse(site):
        _, error = _best_ridge(site, grams.inputs, metric, None)
        curve[0] = _damage(error * whole, whole)
    return curve


def _damage(error: float, whole: float) -> float:
    """An error as the sites' budgets see it: for small ones the error itself, without bound where all is lost.

    The second-order estimate is right for small errors only: a site that loses most of what it says costs more, and
    without this the knapsack takes all from a few sites.
    """
    return error / max(1 - error / whole, 1e-6) if whole > 0 else 0.0


def _intercept(site: Site) -> bool:
    """Whether the fit has an intercept: always at convolutions; elsewhere where the consumer has a bias to hold it.

    A bias that was not there would keep the stock class from loading the result.
    """
    return all(c.bias or c.kind != "linear" for c in site.consumers)


def _moments(site: Site, grams: SiteGrams) -> Centred:
    try:
        return grams.all.centred(_intercept(site))
    except FitError as error:
        raise FitError(f"{site.name}: {error}") from error


def _root(metric: Tensor) -> Tensor:
    """Its symmetric square root."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def _reconstructed(
    small: nn.Module, site: Site, grams: SiteGrams, kept: Tensor, root: Tensor, ridge: float
) -> Reconstruction | None:
    """The site with its producers fitted too; None where that cannot be done, is not to be trusted or does not help."""
    fit, held = grams.rows
    layers = Layers.of(small, site, kept) if fit and held else None
    if layers is None:
        return None
    unknowns = sum(p.weight.numel() for p in layers.producers.values()) + len(kept) * len(root) * site.consumers[0].taps
    positions = over_processes(torch.tensor(float(sum(rows.positions for rows in fit)), device=root.device))
    if float(positions) * len(root) < _EQUATIONS * unknowns:
        return None
    found = reconstruct(layers, fit, held, root, ridge=ridge, intercept=_intercept(site))
    return found if found.after < found.before else None


def _note(error: float) -> str:
    """What the held-out rows say, as a part of the weighted variance of what the consumers should give."""
    return f"held-out error {error:.2%}" if error < float("inf") else ""


def _best_ridge(site: Site, pair: tuple[Gram, Gram], metric: Tensor, columns: Tensor | None) -> tuple[float, float]:
    """The ridge with the least error on held-out rows, and that error as a part of the variance there."""
    intercept = _intercept(site)
    if pair[0].count < 2 or pair[1].count < 2:
        return RIDGES[-1], float("inf")
    fit, held = pair[0].centred(intercept), pair[1].centred(intercept)
    chosen = torch.arange(len(fit.zz), device=fit.zz.device) if columns is None else columns
    scale = metric.diagonal().sqrt()
    yy = float((held.yy * scale.square()).sum())
    best = (RIDGES[-1], float("inf"))
    for ridge in RIDGES:
        try:
            weight = ridge_fit(fit.zz[chosen][:, chosen], fit.zy[chosen], ridge)
        except FitError:
            continue
        error = fit_error(held.zz[chosen][:, chosen], held.zy[chosen] * scale, yy, scale[:, None] * weight)
        if error < best[1]:
            best = (ridge, error)
    return best[0], best[1] / yy if yy > 0 else 0.0


def _by_consumer(site: Site, weight: Tensor, bias: Tensor, width: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    sizes = [c.d_out for c in site.consumers]
    weights = []
    for c, part in zip(site.consumers, torch.split(weight.cpu(), sizes), strict=True):
        weights.append(part.reshape(c.d_out, width, *c.kernel) if c.kind == "conv2d" and width else part)
    biases = torch.split(bias.cpu(), sizes)
    return tuple(weights), tuple(b.clone() for b in biases)
