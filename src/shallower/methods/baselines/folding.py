"""Channels folded into one another: those with like rows become one, without data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shallower.errors import FitError, Refusal
from shallower.methods.baselines.view import View
from shallower.methods.squeezing.site_layers import Producer, SiteLayers
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.sites import Site

_MOST_ROUNDS = 50
"""Of k-means, at most."""


def not_folded(site: Site) -> Refusal | None:
    """Why the channels of a site cannot be merged; None where they can."""
    if site.producer is None:
        return Refusal("its channels are not made by one layer whose rows could be merged")
    if site.bridge.norm_after or site.bridge.has("depthwise") or not site.bridge.pixelwise:
        return Refusal("between the activation and the consumers each channel has numbers of its own, or a pooling")
    if site.bridge.gated and site.bridge.norm_before:
        return Refusal("a norm stands in its gate")
    return None


def folded(view: View, width: int) -> Entry:
    """Merge channels whose rows are alike (k-means); the consumers read each with the sum of its members' columns.

    A merged row is the mean of the rows, scaled so that the channel varies as much as its members do on average, for
    inputs that are not correlated: by (mean |p_i|^2)^(1/2) / |mean p_i|, the data-free REPAIR of the paper. Behind a
    BatchNorm the rows are those with the norm folded in, and the scaling is about the norm's shift. Gated channels,
    whose output is a product, are not scaled.

    Reference: Wang, Sikic, Thiele and Saukh, Forget the data and fine-tuning! Just fold the network to compress, ICLR
    2025 (arXiv 2502.10216), sections 3 and 4 (Fold-AR).

    Raises:
        FitError: the layers of the site are not of the kind whose rows can be merged.
    """
    everything = torch.arange(view.site.width)
    layers = SiteLayers.of(view.model, view.site, everything)
    if layers is None:
        raise FitError(f"{view.site.name}: its channels cannot be merged; leave the site out")
    rows = {name: _rows(producer) for name, producer in layers.producers.items()}
    label = clusters(torch.cat(list(rows.values()), 1), width, view.seed)
    member = torch.nn.functional.one_hot(label, width).T.double()
    counts = member.sum(1, keepdim=True)
    # of each cluster the channel with the largest scale stays: what it is multiplied with must not be near 0
    scale = layers.producers["producer"].scale
    if scale is None:
        scale = torch.ones(view.site.width)
    kept = (member * (scale.abs().double() + 1e-12)).argmax(1)
    order = kept.argsort()
    kept, member, counts = kept[order], member[order], counts[order]
    changed: dict[str, Tensor | None] = {}
    for name, producer in layers.producers.items():
        merged = _joined_channels(producer, rows[name], member / counts, kept, repaired=not view.site.bridge.gated)
        changed[name] = merged.weight
        changed[f"{name}_bias"] = merged.held
    by_channel = view.weight.view(len(view.weight), view.site.width, -1)
    summed = torch.einsum("dnt,kn->dkt", by_channel, member).flatten(1)
    made: Fit = replace(view.fit(kept, summed, view.bias), **changed)  # type: ignore[arg-type]
    return Entry.narrow(view.site, kept, fit=made)


def clusters(points: Tensor, k: int, seed: int = 0) -> Tensor:
    """(n,) int64 labels of k-means, below k, each of them given: seeds drawn by distance, then Lloyd's steps.

        clusters(rows, k=64)

    Args:
        points: (n, d).
        k: 1 .. n.
        seed: of the draws.

    Reference: Arthur and Vassilvitskii, k-means++: The advantages of careful seeding, 2007.
    """
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        nearest[chosen] = 0
        weights = nearest
        if not bool(nearest.any()):
            weights = torch.ones_like(nearest).index_fill(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centres = points[chosen]
    label = torch.full((len(points),), -1)
    for _ in range(_MOST_ROUNDS):
        distance = torch.cdist(points, centres)
        found = distance.argmin(1)
        for empty in set(range(k)) - set(found.tolist()):
            # the farthest point of a cluster with more than one
            crowded = found.bincount(minlength=k)[found] > 1
            own = distance.gather(1, found[:, None]).flatten()
            found[own.masked_fill(~crowded, -1).argmax()] = empty
        if torch.equal(found, label):
            break
        label = found
        centres = torch.zeros_like(centres).index_add(0, label, points) / label.bincount(minlength=k)[:, None]
    return label


def _rows(producer: Producer) -> Tensor:
    """(n, columns [+ 1]) float64: the rows with a BatchNorm folded in, and the shift."""
    rows = producer.weight.double().flatten(1)
    if producer.scale is not None:
        rows = rows * producer.scale.double()[:, None]
    if producer.shift is None:
        return rows
    return torch.cat([rows, producer.shift.double()[:, None]], 1)


def _joined_channels(producer: Producer, rows: Tensor, averaging: Tensor, kept: Tensor, *, repaired: bool) -> Producer:
    """The producer of the channels that stay, with the mean rows of their clusters.

    Args:
        producer: of all channels.
        rows: its rows, see `_rows`.
        averaging: (k, n), rows that sum to 1.
        kept: (k,), of each cluster the channel whose place in a BatchNorm it takes.
        repaired: scale the rows.
    """
    columns = producer.weight[0].numel()
    centre, scaling = averaging @ rows, torch.ones(len(kept), dtype=torch.float64)
    if repaired:
        lengths = averaging @ rows[:, :columns].square().sum(1)
        scaling = (lengths / centre[:, :columns].square().sum(1).clamp_min(1e-30)).sqrt()
        # rows at right angles lose so much; more would be rows that cancel out
        scaling = scaling.minimum(1 / averaging.square().sum(1).sqrt())
    weight = scaling[:, None] * centre[:, :columns]
    shift = producer.shift
    held = producer.held
    if producer.scale is not None:
        weight = weight / producer.scale[kept].double()[:, None]
    if shift is not None and held is not None:
        about = torch.zeros_like(scaling)
        if producer.scale is not None:
            about = averaging @ held.double()
        wanted = scaling * (centre[:, columns] - about) + about
        if producer.scale is None:
            wanted = centre[:, columns]
        held = held[kept] + (wanted - shift[kept].double()).to(held)
        shift = wanted.float()
    weight = weight.reshape(len(kept), *producer.weight.shape[1:]).float()
    return replace(producer, weight=weight, shift=shift, held=held, scale=None)
