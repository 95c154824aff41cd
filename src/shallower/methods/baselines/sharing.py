"""How many channels each site keeps: the same share of all, or what one threshold on the scores leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from shallower.errors import TargetError
from shallower.methods.squeezing.costing import SiteWidths, WidthCosts
from shallower.modules.layers import weight_of
from shallower.planning.allocation import in_proportion
from shallower.planning.costs import Cost
from shallower.planning.targets import Target
from shallower.sites import Sites

Meets = Callable[[SiteWidths], bool]


def shared_widths(
    costs: WidthCosts, target: Target, scores: Mapping[str, Tensor] | None, *, biased: bool = False
) -> dict[str, int]:
    """Widths that meet a target.

    Args:
        costs: of the sites that may be narrowed.
        target: params, macs, size or kv.
        scores: by site, (n,) of its channels, comparable over sites; None for the same share everywhere.
        biased: consumers of narrowed sites get a bias where they have none, which counts too.

    Raises:
        TargetError: no widths meet the target, the model meets it as it is, or it is of another kind.
    """
    if target.unit in ("latency", "drop"):
        raise TargetError(f"the target {target} is not for baselines, which count: params, macs, size or kv")
    sites, before = costs.sites, costs.before

    def after(widths: SiteWidths) -> Cost:
        found = costs.after(widths)
        if not biased:
            return found
        return replace(found, **_with_biases(costs, found, widths))

    def met(widths: SiteWidths) -> bool:
        return target.met(before, after(widths))

    whole = {site.name: site.width for site in sites}
    if met(whole):
        raise TargetError(f"the target {target} is met by the model as it is: there is nothing to do")
    least = {site.name: site.least for site in sites}
    try:
        if scores is None:
            return in_proportion(whole, met, least)
        return above_one_threshold(sites, scores, met)
    except TargetError as error:
        left = target.amount_of(after(least)) / target.amount_of(before)
        raise TargetError(
            f"the target {target} asks for {target.limit(before) / target.amount_of(before):.1%} of the model's "
            f"{target.unit}; with one channel at each of the {len(whole)} sites, {left:.1%} would remain. Ask for "
            "less, or allow more sites"
        ) from error


def _with_biases(costs: WidthCosts, cost: Cost, widths: SiteWidths) -> dict[str, int]:
    """Parameters and bytes with a bias for every consumer of a narrowed site."""
    params, size = cost.params, cost.size
    for site in costs.sites:
        if widths[site.name] == site.width:
            continue
        for m in site.consumers:
            if not m.bias:
                params += m.d_out
                size += m.d_out * weight_of(costs.dense.get_submodule(m.name)).element_size()
    return {"params": params, "size": size}


def above_one_threshold(sites: Sites, scores: Mapping[str, Tensor], met: Meets) -> dict[str, int]:
    """Drop the channels with the least scores of all sites until the target is met; of each site its least stay.

    Args:
        sites: whose channels compete.
        scores: (n,) of each.
        met: whether widths are small enough; narrower ones then are, too.

    Raises:
        TargetError: the least widths are not.
    """
    best: list[Tensor] = []
    for site in sites:
        best.append(scores[site.name].double().sort(descending=True).values[site.least :])
    order = torch.cat(best).sort().values

    def widths(dropped: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for site, free in zip(sites, best, strict=True):
            kept = len(free)
            if dropped:
                kept = int((free > order[dropped - 1]).sum())
            found[site.name] = site.least + kept
        return found

    low, high = 0, len(order)
    if not met(widths(high)):
        raise TargetError("the target cannot be met")
    while high - low > 1:
        middle = (low + high) // 2
        if met(widths(middle)):
            high = middle
        else:
            low = middle
    return widths(high)
