"""Attention heads as channels: which rows and columns they have, how a model is narrowed to some, and what that equals.

A channel is a key-value group: a key head, a value head and the query heads that share them. Its rows go from the
query, key and value maps and its columns from the output projection; attributes that count heads follow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.edits import perform, resize
from shallower.errors import PlanError
from shallower.layers import bias_of, check_shape, weight_of
from shallower.plan import Entry
from shallower.sites import Heads, LinearMap, Rows, Site


def narrowed(site: Site, kept: int, bias: bool | None = None) -> Site:
    """The site with that many channels.

    Args:
        site: of kind "heads".
        kept: channels that stay, at least 1.
        bias: whether the output projection has a bias then; as now where None.
    """
    heads, out = _heads_of(site), site.consumers[0]

    def map_of(m: LinearMap) -> LinearMap:
        return replace(m, d_out=m.d_out // site.width * kept)

    def rows_of(rows: Rows) -> Rows:
        return (rows[0] // site.width * kept if heads.packed == "blocks" else rows[0], rows[1], rows[2])

    smaller = replace(
        heads,
        query=map_of(heads.query),
        key=map_of(heads.key),
        value=map_of(heads.value),
        query_rows=rows_of(heads.query_rows),
        key_rows=rows_of(heads.key_rows),
        value_rows=rows_of(heads.value_rows),
    )
    consumer = replace(out, d_in=kept * heads.block, bias=out.bias if bias is None else bias)
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


def narrow(model: nn.Module, entry: Entry) -> None:
    """Take the dropped heads out of the model, in place.

    Raises:
        PlanError: no head stays, or the model is another one than the site's.
    """
    site, kept = entry.site, entry.kept
    heads, out = _heads_of(site), site.consumers[0]
    if len(kept) == 0:
        raise PlanError(f"{site.name}: attention needs at least one head")
    for m in site.maps:
        check_shape(site.name, model.get_submodule(m.name), m)
    fit = entry.fit
    smaller = narrowed(site, len(kept), None if fit is None or not bool(fit.biases[0].ne(0).any()) else True)
    if len(kept) < site.width:
        by_name = rows(heads, kept)
        for m in _heads_of(smaller).maps:
            layer, own = model.get_submodule(m.name), by_name[m.name]
            weight, bias = weight_of(layer)[own.to(weight_of(layer).device)], bias_of(layer)
            _set(model, m, weight, None if bias is None else bias[own.to(bias.device)])
        for attribute, each in heads.counts:
            value = each * len(kept)
            perform(model, {"edit": "attribute", "name": heads.module, "attribute": attribute, "value": value})
    layer = model.get_submodule(out.name)
    weight, bias = weight_of(layer), bias_of(layer)
    if fit is not None:
        _set(model, smaller.consumers[0], fit.consumers[0], fit.biases[0])
    elif len(kept) < site.width:
        _set(model, smaller.consumers[0], weight[:, columns(heads, kept).to(weight.device)], bias)


def impose(model: nn.Module, entry: Entry) -> None:
    """Make a model with all its heads do what `narrow` makes of it, by hooks: dropped heads give zeros."""
    heads, consumer = _heads_of(entry.site), model.get_submodule(entry.site.consumers[0].name)
    chosen = columns(heads, entry.kept)

    def zero_the_dropped(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        stays = torch.zeros(z.shape[-1], dtype=torch.bool, device=z.device)
        stays[chosen.to(z.device)] = True
        return (torch.where(stays, z, torch.zeros_like(z)),), {}

    def fitted(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        fit = entry.fit
        assert fit is not None
        weight, bias = fit.consumers[0].to(z.device, z.dtype), fit.biases[0].to(z.device, z.dtype)
        return F.linear(z[..., chosen.to(z.device)], weight, bias).to(output.dtype)

    if entry.fit is None:
        consumer.register_forward_pre_hook(zero_the_dropped, with_kwargs=True)
    else:
        consumer.register_forward_hook(fitted, with_kwargs=True)


_COUNTS = ("num_attention_heads", "num_key_value_heads")


def update_configs(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Set the numbers of heads in every `config` whose attentions all have the same new one.

    Only where the configuration also says how large a head is, so that its stock class can be built from it; and only
    where it accepts the numbers.
    """
    narrower = {e.site.name: e for e in entries if e.site.heads is not None and len(e.kept) < e.site.width}
    if not narrower:
        return
    owners: dict[int, tuple[Any, list[str]]] = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is not None and not isinstance(config, nn.Module):
            owners.setdefault(id(config), (config, []))[1].append(name)
    for config, names in owners.values():
        shared = [e for e in narrower.values() if _heads_of(e.site).module in names]
        kinds = {type(model.get_submodule(_heads_of(e.site).module)) for e in shared}
        users = [name for name in names if type(model.get_submodule(name)) in kinds]
        found = {_sizes(e) for e in shared}
        if len(found) != 1 or {_heads_of(e.site).module for e in shared} != set(users):
            continue
        before, after, head_dim = found.pop()
        values = [getattr(config, key, None) for key in _COUNTS]
        present = [(key, new) for key, value, new in zip(_COUNTS, values, after, strict=True) if value is not None]
        now = [value for value in values if value is not None]
        if getattr(config, "head_dim", None) != head_dim or now != list(before[: len(now)]):
            continue
        trial = copy.deepcopy(config)
        for key, new in present:
            setattr(trial, key, new)
        try:
            type(config)(**{key: value for key, value in trial.to_dict().items() if key != "transformers_version"})
        except Exception:  # whatever a configuration raises, it does not accept the numbers
            continue
        for key, new in present:
            setattr(config, key, new)


def _sizes(entry: Entry) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(query heads, key heads) before and after, and the features of one."""
    heads, width, kept = _heads_of(entry.site), entry.site.width, len(entry.kept)
    each = heads.queries_per_group
    return (each * width, width), (each * kept, kept), heads.head_dim


def _heads_of(site: Site) -> Heads:
    if site.heads is None:
        raise PlanError(f"{site.name}: this is no site of attention heads")
    return site.heads


def _set(model: nn.Module, m: LinearMap, weight: Tensor, bias: Tensor | None) -> None:
    """Exchange the layer at `m.name` for one of the sizes of `m`, with these weights."""
    layer = resize(model, m)
    with torch.no_grad():
        own = weight_of(layer)
        own.copy_(weight.to(own.dtype).to(own.device))
        shift = cast("Tensor | None", layer.bias)
        if shift is not None:
            shift.copy_(torch.zeros_like(shift) if bias is None else bias.to(shift.dtype).to(shift.device))
