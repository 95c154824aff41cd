"""Which sites are worth collapsing: those without which a network with merged layers would be dearer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.sites import LinearMap, Site

Unit = Literal["", "params", "macs"]


def paying(sites: Iterable[Site], unit: Unit = "") -> tuple[tuple[Site, ...], dict[str, str]]:
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
    """
    given = list(sites)
    alone = {s.name: "no layers merge when it goes" for s in given if s.producer is None}
    reasons = alone | {s.name: reason for s in given if (reason := cannot_be_linear(s))}
    chosen: set[str] = set()
    for group in _overlapping([site for site in given if site.name not in reasons]):
        chosen |= {site.name for site in _needed(group, unit)}
    for site in given:
        if site.name not in chosen and site.name not in reasons:
            why = Entry.collapse(site).form.why
            reasons[site.name] = "no layer becomes cheaper when it collapses" + (f": {why}" if why else "")
    return tuple(site for site in given if site.name in chosen), reasons


def cannot_be_linear(site: Site) -> str:
    """Why no channel of a site may become linear, "" where it may."""
    return site.not_linear or ("" if site.activation is not None else "it has no activation")


def _needed(group: Sequence[Site], unit: Unit) -> list[Site]:
    """A group without the sites that could stay as they are at no cost, one after the other."""
    needed = list(group)
    cost = _cost(group, needed, unit)
    for site in group:
        others = [other for other in needed if other is not site]
        without = _cost(group, others, unit)
        if all(a <= b for a, b in zip(without, cost, strict=True)):
            needed, cost = others, without
    return needed


def _cost(group: Sequence[Site], collapsed: Sequence[Site], unit: Unit) -> list[int]:
    """Weights and MACs, or the one of them that counts, of a group of which some sites have collapsed."""
    maps = {m.name: m for site in group for m in site.maps}
    for step in steps(Entry.collapse(site) for site in collapsed):
        for m in (step.entry.site.producer, step.entry.site.gate):
            if m is not None:
                del maps[m.name]
        maps |= {m.name: m for m in step.form.maps}
    weights, macs = sum(_weights(m) for m in maps.values()), sum(m.macs for m in maps.values())
    return {"": [weights, macs], "params": [weights], "macs": [macs]}[unit]


def _weights(m: LinearMap) -> int:
    return replace(m, bias=False).params


def _overlapping(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites in groups that share no layer, each in the order given."""
    groups: list[list[Site]] = []
    for site in sites:
        names = {m.name for m in site.maps}
        touching = [g for g in groups if any(names & {m.name for m in other.maps} for other in g)]
        groups = [g for g in groups if g not in touching] + [[s for g in touching for s in g] + [site]]
    return groups
