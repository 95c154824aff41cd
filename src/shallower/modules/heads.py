"""Attention heads taken out of a model, as edits.

A channel of such a site is a key-value group: a key head, a value head and the query heads that share them. Its rows go
from the query, key and value maps and its columns from the output projection; attributes that count heads follow.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from shallower.errors import PlanError
from shallower.modules.edits import Attribute, Edit, Resize, Weights, perform
from shallower.modules.layers import bias_of, check_shape, weight_of
from shallower.sites import LinearMap, Site
from shallower.sites.heads import columns, heads_of, narrowed, rows


def without_heads(
    model: nn.Module, site: Site, kept: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> list[Edit]:
    """The edits that take the dropped heads out of a model.

        for edit in without_heads(model, site, torch.tensor([0, 2])):
            perform(model, edit)

    Args:
        model: not changed.
        site: of kind "heads". Its projections may read fewer channels by now than when it was found.
        kept: the heads that stay, ascending.
        weight: of the output projection afterwards; its own columns where None.
        bias: of the output projection afterwards, where `weight` is given.

    Raises:
        PlanError: no head stays, or the model is another one than the site's.
    """
    heads = heads_of(site)
    if len(kept) == 0:
        raise PlanError(f"{site.name}: attention needs at least one head")
    out = site.consumers[0]
    inputs = {m.name: _inputs(model, m) for m in heads.maps}
    for m in site.maps:
        check_shape(site.name, model.get_submodule(m.name), replace(m, d_in=inputs.get(m.name, m.d_in)))
    has_bias = None
    if bias is not None and bool(bias.ne(0).any()):
        has_bias = True
    smaller = narrowed(site, len(kept), has_bias)
    edits: list[Edit] = []
    if len(kept) < site.width:
        own_rows = rows(heads, kept)
        for m in heads_of(smaller).maps:
            layer = model.get_submodule(m.name)
            own = own_rows[m.name].to(weight_of(layer).device)
            shift = bias_of(layer)
            if shift is not None:
                shift = shift[own]
            edits += _set_layer(replace(m, d_in=inputs[m.name]), weight_of(layer)[own], shift)
        for attribute, each in heads.counts:
            edits.append(Attribute(heads.module, attribute, each * len(kept)))
    if weight is not None:
        edits += _set_layer(smaller.consumers[0], weight, bias)
    elif len(kept) < site.width:
        layer = model.get_submodule(out.name)
        chosen = columns(heads, kept).to(weight_of(layer).device)
        edits += _set_layer(smaller.consumers[0], weight_of(layer)[:, chosen], bias_of(layer))
    return edits


def narrow(model: nn.Module, site: Site, kept: Tensor) -> None:
    """Take the dropped heads out of a model, in place.

    Raises:
        PlanError: no head stays, or the model is another one than the site's.
    """
    for edit in without_heads(model, site, kept):
        perform(model, edit)


def _inputs(model: nn.Module, m: LinearMap) -> int:
    """How many channels a projection reads by now, which an earlier entry of a plan may have changed."""
    try:
        layer = model.get_submodule(m.name)
        return weight_of(layer).shape[1]
    except AttributeError:
        raise PlanError(f"`{m.name}` is no linear map of this model; were the sites found in it?") from None


def _set_layer(m: LinearMap, weight: Tensor, bias: Tensor | None) -> list[Edit]:
    """The layer at `m.name` with the sizes of `m` and these numbers."""
    numbers = {"weight": weight}
    if m.bias:
        numbers["bias"] = weight.new_zeros(m.d_out) if bias is None else bias
    return [Resize.to(m), Weights(m.name, numbers)]
