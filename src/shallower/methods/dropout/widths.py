"""The grid of widths of a site, and what a choice of widths is called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from shallower.errors import MethodError
from shallower.sites import Site


def grid(site: Site, lower_bound: int | str, step: int | str) -> tuple[int, ...]:
    """The widths of a site, ascending; the last is n."""
    n = site.width
    low, stride = _channels(site, "lower_bound", lower_bound), _channels(site, "step", step)
    return (*range(low, n, stride), n)


def _channels(site: Site, name: str, value: int | str) -> int:
    if isinstance(value, str):
        return max(1, math.ceil(share_of(value) * site.width - 1e-9))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= site.width:
        raise MethodError(
            f"{site.name}: {name}={value!r}; it is a number of channels from 1 to {site.width}, or a share"
        )
    return value


def share_of(text: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not text.strip().endswith("%") or not 0 < share <= 1:
        raise MethodError(f"{text!r} is not a share of the channels, like '50%'")
    return share


def at_most(table: Sequence[int], limit: float) -> int:
    return max((k for k in table if k <= limit + 1e-9), default=table[0])


def interpolated(table: Sequence[int], known: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """The loss at every width of the table, between those that were tried along straight lines, never negative."""
    xs = sorted(known)
    for k in table:
        right = next((x for x in xs if x >= k), xs[-1])
        left = max((x for x in xs if x <= k), default=right)
        part = 0.0 if right == left else (k - left) / (right - left)
        yield k, max(0.0, known[left] * (1 - part) + known[right] * part)


def summary(table: Sequence[int] | None) -> str:
    return "no such site" if table is None else f"{len(table)} widths from {table[0]} to {table[-1]}"


def listed(widths: Mapping[str, int]) -> str:
    named = [f"{name}: {k}" for name, k in widths.items()]
    return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
