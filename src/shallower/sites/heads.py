"""Which rows and columns of a site's layers belong to which head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.sites.parts import HeadRows, Heads, LinearMap
from shallower.sites.site import Site


def narrowed(site: Site, kept: int, bias: bool | None = None) -> Site:
    """The site with that many channels.

    Args:
        site: of kind "heads".
        kept: channels that stay, at least 1.
        bias: whether the output projection has a bias then; as now where None.
    """
    heads, out = heads_of(site), site.consumers[0]

    def map_of(m: LinearMap) -> LinearMap:
        return replace(m, d_out=m.d_out // site.width * kept)

    def rows_of(rows: HeadRows) -> HeadRows:
        # blocks of queries, keys and values move up where those before them get smaller
        start, step, length = rows
        if heads.packed == "blocks":
            start = start // site.width * kept
        return start, step, length

    smaller = replace(
        heads,
        query=map_of(heads.query),
        key=map_of(heads.key),
        value=map_of(heads.value),
        query_rows=rows_of(heads.query_rows),
        key_rows=rows_of(heads.key_rows),
        value_rows=rows_of(heads.value_rows),
    )
    if bias is None:
        bias = out.bias
    consumer = replace(out, d_in=kept * heads.block, bias=bias)
    return replace(site, width=kept, heads=smaller, consumers=(consumer,))


def rows(heads: Heads, kept: Tensor) -> dict[str, Tensor]:
    """The rows of each projection, by its name, that these channels have, ascending, int64."""
    parts: dict[str, list[Tensor]] = {}
    for m, (start, step, length) in (
        (heads.query, heads.query_rows),
        (heads.key, heads.key_rows),
        (heads.value, heads.value_rows),
    ):
        own = start + kept.cpu()[:, None] * step + torch.arange(length)
        parts.setdefault(m.name, []).append(own.flatten())
    return {name: torch.cat(own).sort().values for name, own in parts.items()}


def columns(heads: Heads, kept: Tensor) -> Tensor:
    """The columns of the output projection that these channels have, ascending, int64."""
    return (kept.cpu()[:, None] * heads.block + torch.arange(heads.block)).flatten()


def heads_of(site: Site) -> Heads:
    if site.heads is None:
        raise PlanError(f"{site.name}: this is no site of attention heads")
    return site.heads
