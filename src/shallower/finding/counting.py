"""Which attributes of an attention module count its heads: found by trying it with one head less.

A forward reshapes by numbers that its module holds ("num_heads"). Which of them these are is not guessed from names: a
copy of the model without data is narrowed by one head, its attributes are changed, and its sites are found again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import torch
from torch import nn

from shallower.core.failures import is_out_of_memory
from shallower.core.inputs import Inputs
from shallower.errors import ShallowerError
from shallower.finding.attention import head_sites
from shallower.finding.graph import Graph
from shallower.modules.attachment import copied
from shallower.modules.heads import narrow
from shallower.modules.offloading import weightless
from shallower.recording.tracing import trace_forward
from shallower.sites import Site
from shallower.sites.heads import narrowed

MOST_ATTRIBUTES = 3
"""Attributes that are changed together, at most."""

Counts = tuple[tuple[str, int], ...]


def with_counts(
    model: nn.Module, inputs: Inputs, items: Iterable[tuple[int, Site]]
) -> tuple[list[tuple[int, Site]], dict[str, str]]:
    """The sites with their `counts`, and those whose forward does not follow narrower maps, with the reason."""
    usable, skipped = [], dict[str, str]()
    known: dict[tuple[object, ...], Counts | None] = {}
    for position, site in items:
        heads = site.heads
        if heads is None:
            continue
        if site.width == 1:
            skipped[site.name] = "it has one key-value head only"
            continue
        module = model.get_submodule(heads.module)
        candidates = tuple(_candidates(module, site))
        rows = (heads.query_rows, heads.key_rows, heads.value_rows)
        kind = (type(module), heads.packed, rows, heads.queries_per_group, site.width, candidates)
        if kind not in known:
            known[kind] = _counts(model, inputs, site, candidates)
        counts = known[kind]
        if counts is None:
            skipped[site.name] = f"the forward of {type(module).__name__} does not follow a smaller number of heads"
        else:
            usable.append((position, replace(site, heads=replace(heads, counts=counts))))
    return usable, skipped


def _candidates(module: nn.Module, site: Site) -> Iterable[tuple[str, int]]:
    """Attributes whose value may be a number of heads or of all their channels, with their value for one channel."""
    heads = site.heads
    assert heads is not None
    ends = {heads.queries_per_group * heads.head_dim, heads.head_dim, heads.value_dim, heads.block}
    every = ends | {1, heads.queries_per_group} | {m.d_out // site.width for m in heads.maps}
    for name, value in vars(module).items():
        if type(value) is int and value > 0 and value % site.width == 0 and value // site.width in every:
            yield name, value // site.width


def _counts(model: nn.Module, inputs: Inputs, site: Site, candidates: Counts) -> Counts | None:
    """The fewest attributes that have to change, and those that are named after heads besides."""
    for size in range(min(len(candidates), MOST_ATTRIBUTES) + 1):
        for chosen in combinations(candidates, size):
            if _works(model, inputs, site, chosen):
                also = [c for c in candidates if c not in chosen and "head" in c[0] and not _is_size(c[0])]
                more = tuple(c for c in candidates if c in chosen or c in also)
                return more if also and _works(model, inputs, site, more) else chosen
    return None


def _is_size(name: str) -> bool:
    """Whether an attribute named after heads is the size of one, or says how many share one."""
    return name.endswith(("_dim", "head_size", "groups")) and not name.startswith("all")


def _works(model: nn.Module, inputs: Inputs, site: Site, counts: Counts) -> bool:
    """Whether the model runs with one head less, these attributes changed, and has the site that it should have."""
    assert site.heads is not None
    trial = copied(model, weightless(model.parameters()))
    fewer = replace(site, heads=replace(site.heads, counts=counts))
    try:
        narrow(trial, fewer, torch.arange(site.width - 1))
        found, _ = head_sites(Graph(trace_forward(trial, inputs)))
    except (ShallowerError, RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return False
    wanted = _comparable(narrowed(site, site.width - 1))
    return any(_comparable(again) == wanted for _, again in found)


def _comparable(site: Site) -> Site:
    """The site without what cannot be told of a single head: how far heads are apart."""
    if site.width > 1 or site.heads is None:
        return site
    nowhere = (0, 0, 0)
    heads = replace(site.heads, packed="", query_rows=nowhere, key_rows=nowhere, value_rows=nowhere)
    return replace(site, heads=heads)
