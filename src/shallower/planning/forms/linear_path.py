"""The linear path beside kept channels, and of how many channels it needs."""

from __future__ import annotations

from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.planning.forms.constants import has_constants
from shallower.planning.forms.form import Through
from shallower.planning.geometry import geometry, is_plain, same_stride
from shallower.sites import LinearMap, Site


def path_of(entry: Entry, producer: LinearMap, consumers: tuple[LinearMap, ...]) -> tuple[int, Through]:
    """Channels of the linear path, and what they are.

    C diag(s) P of r linear channels has rank r at most; where the producer has fewer inputs, or all consumers together
    fewer outputs, the path through those is as exact and smaller.

    Raises:
        PlanError: a fitted path reads other inputs than the producer has by now.
    """
    given = _given(entry, producer)
    if given is None:
        return 0, "channels"
    if len(entry.kept) == 0:
        return given or producer.d_in, "channels"
    bridge = entry.site.bridge
    if not bridge.pixelwise:
        return given, "channels"
    ranks: list[tuple[int, Through]] = []
    if given:
        ranks.append((given, "channels"))
    constant = bridge.pads(consumers) and has_constants(entry, producer)
    if not constant and producer.taps == 1 and producer.groups == 1 and is_plain(producer):
        ranks.append((producer.d_in, "inputs"))
    if all(c.taps == 1 and c.groups == 1 and c.padding == (0, 0) for c in consumers) and same_stride(consumers):
        ranks.append((sum(c.d_out for c in consumers), "outputs"))
    if not ranks:
        raise PlanError(
            f"{entry.site.name}: kept channels and one full map do not fit beside each other; give down and ups"
        )
    return min(ranks, key=lambda rank: rank[0])


def _given(entry: Entry, producer: LinearMap) -> int | None:
    """Channels of the path as the entry has it: 0 for one full map, None where there is no path."""
    fit = entry.fit
    if fit is None:
        return len(entry.linear) or None
    if not fit.ups:
        return None
    if fit.down is None:
        rank, read = 0, {up.shape[1] for up in fit.ups}
    else:
        rank, read = fit.down.shape[0], {fit.down.shape[1]}
    if read != {producer.d_in}:
        raise PlanError(
            f"{entry.site.name}: its linear path was fitted for {min(read)} inputs, and `{producer.name}` has "
            f"{producer.d_in} after the earlier entries of the plan. Apply those first, and fit this site on the result"
        )
    check_geometry(entry.site, producer)
    return rank


def check_geometry(site: Site, producer: LinearMap) -> None:
    """Check that a producer still is the kind of convolution that maps were fitted for.

    Raises:
        PlanError: an earlier entry has changed its kernel, stride or padding.
    """
    if site.producer is not None and geometry(producer) != geometry(site.producer):
        raise PlanError(
            f"{site.name}: its maps were fitted for another kernel, stride or padding than `{producer.name}` has after "
            "the earlier entries of the plan. Apply those first, and fit this site on the result"
        )
