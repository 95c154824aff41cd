"""Which sites are worth collapsing: those without which a network with merged layers would be more expensive."""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from shallower.errors import PlanError, Refusal
from shallower.planning.entries import Entry
from shallower.planning.forms import form_of
from shallower.planning.forms.steps import StepWalk, in_execution_order
from shallower.sites import LinearMap, Site, Sites, by_name, overlapping, tally

PaidUnit = Literal["", "params", "macs"]

_NEAR = 5
"""Sites of a chain that are judged together: one and the next ones that read what it writes."""


def paying(sites: Iterable[Site], unit: PaidUnit = "") -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites whose collapse makes something cheaper, and why each of the others does not.

        chosen, left_out = paying(sites, "macs")

    Only weights count: a BatchNorm that folds into its convolution saves parameters, but it could do so with the
    activation in place. Sites that overlap are judged together, since a depthwise convolution between two others pays
    only where all three become one: of those that may become linear each site stays without which the weights or the
    MACs would be more.

    Args:
        sites: as found.
        unit: what has to become less; "" for either.

    Returns:
        The sites that pay, in the order given, and name -> reason for the rest.

    Raises:
        PlanError: there is no such unit.
    """
    if unit not in ("", "params", "macs"):
        raise PlanError(f"what pays is counted in 'params' or 'macs' ('' for either), not in {unit!r:.40}")
    given = list(sites)
    usable, reasons = Sites(tuple(given)).partition(_not_merged)
    chosen: set[str] = set()
    for group in overlapping(usable):
        chosen |= _needed(group, unit)
    for site in given:
        if site.name not in chosen and site.name not in reasons:
            why = form_of(Entry.collapse(site)).why
            reasons[site.name] = "no layer becomes cheaper when it collapses"
            if why:
                reasons[site.name] += f": {why}"
    return tuple(site for site in given if site.name in chosen), reasons


def _not_merged(site: Site) -> Refusal | None:
    """Why no layers become one at a site, as far as it says."""
    if site.bridge.not_linear is None and site.producer is None:
        return Refusal("no layers merge when it goes")
    return site.bridge.not_linear


def _needed(group: Sequence[Site], unit: PaidUnit) -> set[str]:
    """Names of a group's sites, without those that could stay as they are at no cost, one after the other."""
    ordered = in_execution_order(map(Entry.collapse, group))
    walk = StepWalk(ordered)
    needed: set[str] = set()
    for entry in ordered:
        near = walk.following(entry)[:_NEAR]
        names: set[str] = set()
        for other in near:
            names.update(by_name(other.site.maps))
        collapsed, others = walk.ahead(near), walk.ahead(near[1:])
        cost = _cost_of_maps(collapsed.maps, names - collapsed.gone, unit)
        without = _cost_of_maps(ChainMap(others.maps, walk.maps), names - others.gone, unit)
        if any(map(operator.gt, without, cost)):
            walk.take(entry, walk.best(entry, {}))
            needed.add(entry.site.name)
    return needed


def _cost_of_maps(maps: Mapping[str, LinearMap], names: Iterable[str], unit: PaidUnit) -> list[int]:
    """Weights and MACs of some maps, or the one of them that counts."""
    found = tally(map(maps.__getitem__, names))
    return {"": [found.weights, found.macs], "params": [found.weights], "macs": [found.macs]}[unit]
