"""The widths that a site may have, and how they are drawn, chosen and named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from shallower.core.text import listing
from shallower.errors import MethodError
from shallower.sites import Site, Sites

Table = Mapping[str, tuple[int, ...]]
"""By the name of the site, its widths, ascending; the last is the full one."""


def table_of(sites: Sites, lower_bound: int | str, step: int | str) -> dict[str, tuple[int, ...]]:
    """The widths of every site.

        table_of(sites, "25%", 8)       # {"head": (16, 24, 32, 40, 48, 56, 64)}

    Args:
        sites: whose channels can be kept one by one.
        lower_bound: the smallest width, as a number of channels or as a share ("25%").
        step: between widths, likewise.

    Raises:
        MethodError: one of them is neither.
    """
    table = {}
    for site in sites:
        low = _channel_number(site, "lower_bound", lower_bound)
        stride = _channel_number(site, "step", step)
        table[site.name] = (*range(low, site.width, stride), site.width)
    return table


def full(table: Table) -> dict[str, int]:
    """Every site at its full width."""
    return {name: widths[-1] for name, widths in table.items()}


def smallest(table: Table) -> dict[str, int]:
    """Every site at its smallest width."""
    return {name: widths[0] for name, widths in table.items()}


def drawn(table: Table, p: float, shared: float, generator: torch.Generator) -> dict[str, int]:
    """Random widths of one pass: below the full one with probability p, uniform over the table.

    Args:
        table: of all sites.
        p: probability of a narrow width, for each site.
        shared: probability that one draw decides all sites.
        generator: on the CPU, so that all processes draw the same.
    """
    together, *rest = torch.rand(1 + 2 * len(table), generator=generator, dtype=torch.float64).tolist()
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    if together < shared:
        pairs = pairs[:1] * len(pairs)
    widths = {}
    for (coin, share), (name, own) in zip(pairs, table.items(), strict=True):
        narrow = own[:-1] or own
        widths[name] = own[-1]
        if coin < p:
            widths[name] = narrow[int(share * len(narrow))]
    return widths


def share_of(text: str) -> float:
    """A share of the channels, "50%" -> 0.5.

    Raises:
        MethodError: it is not a share above 0 and up to 100 %.
    """
    number = math.nan
    if text.strip().endswith("%"):
        try:
            number = float(text.strip().removesuffix("%")) / 100
        except ValueError:
            number = math.nan
    if not 0 < number <= 1:
        raise MethodError(f"{text!r} is not a share of the channels; write it like '50%'")
    return number


def nearest(widths: Sequence[int], share: float) -> int:
    """The width nearest to a share of the full one, the smaller of two that are as near."""
    wanted = share * widths[-1]
    return min(widths, key=lambda k: (abs(k - wanted), k))


def at_most(widths: Sequence[int], limit: float) -> int:
    """The largest width up to a limit, the smallest where none is."""
    return max((k for k in widths if k <= limit + 1e-9), default=widths[0])


def checked(site: Site, width: int) -> int:
    """The width, if it is a number of channels that the site can keep.

    Raises:
        MethodError: it is not.
    """
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= site.width:
        raise MethodError(f"{site.name}: width {width!r} must be a number of channels from 1 to {site.width}")
    return width


def summary(widths: Sequence[int] | None) -> str:
    """How many widths, and from where to where, for people."""
    if widths is None:
        return "no such site"
    return f"{len(widths)} widths from {widths[0]} to {widths[-1]}"


def named_widths(widths: Mapping[str, int]) -> str:
    """The first few widths by site, for people."""
    return listing([f"{name}: {k}" for name, k in widths.items()], 4)


def _channel_number(site: Site, name: str, value: int | str) -> int:
    """A number of channels that was given as such or as a share."""
    if isinstance(value, str):
        return max(1, math.ceil(share_of(value) * site.width - 1e-9))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= site.width:
        raise MethodError(
            f"{site.name}: {name}={value!r} must be a number of channels from 1 to {site.width}, or a share like '25%'"
        )
    return value
