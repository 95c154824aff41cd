"""Attention heads as channels: which rows and columns they have, how a model is narrowed to some, and what that equals.

A channel is a key-value group: a key head, a value head and the query heads that share them. Its rows go from the
query, key and value maps and its columns from the output projection; attributes that count heads follow.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from shallower.errors import PlanError
from shallower.modules.edits import perform, resize
from shallower.modules.layers import bias_of, check_shape, weight_of
from shallower.sites import LinearMap, Site
from shallower.sites.heads import columns, heads_of, narrowed, rows


def narrow(
    model: nn.Module, site: Site, kept: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Take the dropped heads out of the model, in place.

    Args:
        model: the one to change.
        site: of kind "heads".
        kept: the heads that stay, ascending.
        weight: of the output projection afterwards; its own columns where None.
        bias: of the output projection afterwards, where `weight` is given.

    Raises:
        PlanError: no head stays, or the model is another one than the site's.
    """
    heads, out = heads_of(site), site.consumers[0]
    if len(kept) == 0:
        raise PlanError(f"{site.name}: attention needs at least one head")
    for m in site.maps:
        check_shape(site.name, model.get_submodule(m.name), m)
    has_bias = True if bias is not None and bool(bias.ne(0).any()) else None
    smaller = narrowed(site, len(kept), has_bias)
    if len(kept) < site.width:
        by_name = rows(heads, kept)
        for m in heads_of(smaller).maps:
            layer, own = model.get_submodule(m.name), by_name[m.name]
            rows_kept, shift = weight_of(layer)[own.to(weight_of(layer).device)], bias_of(layer)
            _set(model, m, rows_kept, None if shift is None else shift[own.to(shift.device)])
        for attribute, each in heads.counts:
            value = each * len(kept)
            perform(model, {"edit": "attribute", "name": heads.module, "attribute": attribute, "value": value})
    if weight is not None:
        _set(model, smaller.consumers[0], weight, bias)
    elif len(kept) < site.width:
        layer = model.get_submodule(out.name)
        own_weight = weight_of(layer)
        chosen = columns(heads, kept).to(own_weight.device)
        _set(model, smaller.consumers[0], own_weight[:, chosen], bias_of(layer))


def _set(model: nn.Module, m: LinearMap, weight: Tensor, bias: Tensor | None) -> None:
    """Exchange the layer at `m.name` for one of the sizes of `m`, with these weights."""
    layer = resize(model, m)
    with torch.no_grad():
        own = weight_of(layer)
        own.copy_(weight.to(own.dtype).to(own.device))
        shift = cast("Tensor | None", layer.bias)
        if shift is not None:
            shift.copy_(torch.zeros_like(shift) if bias is None else bias.to(shift.dtype).to(shift.device))
