"""A plan's layers with the padding moved to the first of two convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from shallower.planning.geometry import joint_padding
from shallower.planning.paying import PaidUnit, paying
from shallower.sites import LinearMap, Site, Sites, by_name


def as_moved(sites: Iterable[Site], chosen: Iterable[Site]) -> list[Site]:
    """The descriptions that the sites have once `move_padding` has moved the padding of the chosen ones.

    Args:
        sites: as they are now.
        chosen: of these, in the order of execution where they overlap.
    """
    given = list(sites)
    maps: dict[str, LinearMap] = {}
    for site in given:
        maps |= by_name(site.maps)
    for site in chosen:
        producer, *readers = map(maps.__getitem__, by_name(site.maps))
        (height, width), outer = readers[0].size, readers[0].padding
        grown = (height + 2 * outer[0], width + 2 * outer[1])
        positions = producer.positions
        if height and width:
            positions = positions * grown[0] * grown[1] // (height * width)
        padding = joint_padding(producer.padding, producer.stride, outer)
        maps[producer.name] = replace(producer, padding=padding, positions=positions)
        for m in readers:
            maps[m.name] = replace(m, padding=(0, 0), size=grown)
    return [_with_maps(site, maps) for site in given]


def _with_maps(site: Site, maps: Mapping[str, LinearMap]) -> Site:
    """A site whose producer and consumers are these by now."""
    if site.producer is None:
        return site
    return replace(site, producer=maps[site.producer.name], consumers=tuple(maps[m.name] for m in site.consumers))


def worth_moving(sites: Iterable[Site], unit: PaidUnit = "") -> tuple[Site, ...]:
    """Of sites that are to become linear, those whose padding has to move for layers to merge into something cheaper.

        moved = sh.move_padding(model, sh.worth_moving(sites.select("features.3.*")))

    Args:
        sites: in order of execution; those of a block together.
        unit: what has to become less ("params" or "macs"); "" for either.
    """
    given = list(sites)
    movable = list(filter(_has_padding_between, given))
    pays = Sites(paying(as_moved(given, movable), unit)[0]).names
    return tuple(site for site in movable if site.name in pays)


def _has_padding_between(site: Site) -> bool:
    """Whether there is padding to move, as far as the description tells."""
    bridge = site.bridge
    if site.producer is None or bridge.not_merged is not None or bridge.has("depthwise") or bridge.has("pool"):
        return False
    paddings = {c.padding for c in site.consumers}
    return all(m.kind == "conv2d" for m in site.maps) and len(paddings) == 1 and paddings != {(0, 0)}
