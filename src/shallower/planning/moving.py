"""A plan's layers with the padding moved to the first of two convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from shallower.planning.paying import PaidUnit, paying
from shallower.sites import LinearMap, Site


def as_moved(sites: Iterable[Site], chosen: Iterable[Site]) -> list[Site]:
    """The descriptions that the sites have once `move_padding` has moved the padding of the chosen ones.

    Args:
        sites: as they are now.
        chosen: of these, in the order of execution where they overlap.
    """
    given = list(sites)
    maps = {m.name: m for site in given for m in site.maps}
    for site in chosen:
        producer, outer = maps[site.maps[0].name], maps[site.maps[1].name].padding
        grown = [(size + 2 * p, size) for size, p in zip(maps[site.maps[1].name].size, outer, strict=True)]
        positions = producer.positions
        for new, old in grown:
            if old:
                positions = positions * new // old
        padding = [p + s * q for p, s, q in zip(producer.padding, producer.stride, outer, strict=True)]
        maps[producer.name] = replace(producer, padding=(padding[0], padding[1]), positions=positions)
        for m in site.maps[1:]:
            maps[m.name] = replace(maps[m.name], padding=(0, 0), size=(grown[0][0], grown[1][0]))
    return [_with_maps(site, maps) for site in given]


def _with_maps(site: Site, maps: Mapping[str, LinearMap]) -> Site:
    """A site whose producer and consumers are these by now."""
    if site.producer is None:
        return site
    return replace(site, producer=maps[site.producer.name], consumers=tuple(maps[m.name] for m in site.consumers))


def worth_moving(sites: Iterable[Site], unit: PaidUnit = "") -> tuple[Site, ...]:
    """Of sites that are to become linear, those whose padding has to move for layers to merge into something cheaper.

        moved = move_padding(model, worth_moving(sites.select("features.3.*")))

    Args:
        sites: in order of execution; those of a block together.
        unit: what has to become less ("params" or "macs"); "" for either.
    """
    given = list(sites)
    movable = list(filter(_has_padding_between, given))
    pays = {site.name for site in paying(as_moved(given, movable), unit)[0]}
    return tuple(site for site in movable if site.name in pays)


def _has_padding_between(site: Site) -> bool:
    """Whether there is padding to move, as far as the description tells."""
    bridge = site.bridge
    if site.producer is None or bridge.not_merged is not None or bridge.has("depthwise") or bridge.has("pool"):
        return False
    paddings = {c.padding for c in site.consumers}
    return all(m.kind == "conv2d" for m in site.maps) and len(paddings) == 1 and paddings != {(0, 0)}
