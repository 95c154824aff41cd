"""Sites for people: a table, and how much of a network they can give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from shallower.core.text import amount, table
from shallower.sites.site import Site
from shallower.sites.slots import positions_each

_WIDEST = 99
_LEAST_NAME = 24
"""Columns of a table, and of the names in it, at least."""

Shares = dict[int, float]
"""Axis -> the share of its positions in which channels of sites stand."""


def table_of_sites(sites: Iterable[Site], methods: Mapping[str, str] | None = None) -> str:
    """A row for each site: kind, activation, width, what its channels may become, params, MACs, and its calls.

    Args:
        sites: as found.
        methods: letters for the methods that use each site, by its name; for one more column.
    """
    header = ["site", "kind", "f", "width", "fates", "params", "MACs"]
    if methods is not None:
        header.append("methods")
    rows: list[list[str]] = []
    for site in sites:
        row = [site.name, site.kind, site.activation_name, str(site.width or ""), fates_of(site)]
        row += [amount(site.params), amount(site.macs)]
        if methods is not None:
            row.append(methods.get(site.name) or "-")
        row.append(f"x{site.calls}" if site.calls > 1 else "")
        rows.append(row)
    names = [row[0] for row in rows]
    most = _WIDEST - _beside_names(_table_lines(header, [["", *row[1:]] for row in rows]))
    for row in rows:
        if len(row[0]) > max(most, _LEAST_NAME):
            row[0] = ""
    lines = _table_lines(header, rows)
    found = lines[:1]
    for name, row, line in zip(names, rows, lines[1:], strict=True):
        # a name that is long stands alone
        found += [line] if row[0] else [name, line]
    return "\n".join(found)


def _table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return table([*header, ""], rows, right=(3, 5, 6)).splitlines()


def _beside_names(lines: Iterable[str]) -> int:
    """What a table takes beside the names of its sites."""
    return max(map(len, lines)) - len("site")


def fates_of(site: Site) -> str:
    """What the site's channels may become."""
    fates: list[str] = []
    if site.bridge.not_narrow is None:
        fates += ["keep", "drop"]
    if site.bridge.not_linear is None:
        fates.append("linear")
    return " ".join(fates)


def params_of_halves(sites: Iterable[Site], params: int) -> int:
    """The parameters that would remain of a network if each site that can be narrowed kept half of its channels.

    Args:
        sites: as found.
        params: of the network.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, Shares] = {}

    def note(tensor: str, shape: tuple[int, ...], axis: int, share: float) -> None:
        shapes[tensor] = shape
        axes = held.setdefault(tensor, {})
        axes[axis] = min(1.0, axes.get(axis, 0.0) + share)

    for site in sites:
        if site.bridge.not_narrow is not None or site.width < 2:
            continue
        for slot in site.slots:
            if slot.trained:
                share = positions_each(slot.spans) * site.width / slot.shape[slot.axis]
                note(slot.tensor, slot.shape, slot.axis, share)
        if site.followed:
            continue
        made = [m for m in (site.gate, site.producer, *site.bridge.depthwise) if m is not None]
        for m in made:
            note(f"{m.name}.weight", (m.d_out, m.weights // m.d_out), 0, 1.0)
            if m.bias:
                note(f"{m.name}.bias", (m.d_out,), 0, 1.0)
        for m in site.consumers:
            note(f"{m.name}.weight", (m.d_out, m.weights // m.d_out), 1, site.width * site.block / m.d_in)
        note(f"{site.name}:norms", (site.width * site.bridge.norm_params,), 0, 1.0)
    gone = 0.0
    for tensor, axes in held.items():
        left = prod(1 - share / 2 for share in axes.values())
        gone += prod(shapes[tensor]) * (1 - left)
    return max(0, params - round(gone))
