"""Numbers in a model's config and attributes that follow its new widths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from shallower.modules.layers import kind_of, weight_of
from shallower.planning.entries import Entry
from shallower.planning.steps import Step
from shallower.sites.heads import heads_of

WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "d_ff",
    "hidden_dim",
    "ffn_hidden_size",
)
"""Attributes of Transformers configurations that say how wide the feed-forward layers are."""


def update_widths(model: nn.Module, todo: Sequence[Step]) -> None:
    """Set the width in every `config` of the model that became uniformly narrower, in stock modules.

    A width is changed only if every layer under the config's owner that had the old width now has the same new one.
    """
    owners: dict[int, tuple[Any, list[str]]] = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is not None and not isinstance(config, nn.Module):
            owners.setdefault(id(config), (config, []))[1].append(name)
    for config, names in owners.values():
        for key in WIDTHS:
            old = _width(config, key)
            if old is None:
                continue
            part = key.split("_")[0] if key in ("encoder_ffn_dim", "decoder_ffn_dim") else ""
            new = _new_width(model, todo, names, part, old)
            if new is not None:
                setattr(config, key, new)


def _width(config: Any, key: str) -> int | None:
    value = getattr(config, key, None)
    if key == "n_inner" and hasattr(config, "n_inner") and value is None:  # GPT-2: four times the hidden width
        hidden = getattr(config, "n_embd", None)
        value = 4 * hidden if isinstance(hidden, int) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _new_width(model: nn.Module, todo: Sequence[Step], names: list[str], part: str, old: int) -> int | None:
    def owned(module: str) -> bool:
        inside = any(name == "" or module == name or module.startswith(f"{name}.") for name in names)
        return inside and (not part or part in module.split("."))

    widths, changed, counts = set(), set(), {old}
    for step in todo:
        site, form = step.entry.site, step.form
        if site.width != old or site.producer is None or not owned(site.producer.name):
            continue
        biases = [m.bias for m in site.consumers] == [m.bias for m in form.consumers]
        if form.kind != "narrower" or form.slopes or not biases:
            return None
        widths.add(form.kept)
        changed |= {m.name for m in site.maps}
        counts |= {2 * old} if site.packed else set()
    if len(widths) != 1:
        return None
    for name, module in model.named_modules():
        if kind_of(module) and owned(name) and name not in changed:
            d_out, d_in = weight_of(module).shape[:2]
            if d_in == old or d_out in counts:
                return None
    return widths.pop()


_COUNTS = ("num_attention_heads", "num_key_value_heads")


def update_head_counts(model: nn.Module, entries: Sequence[Entry]) -> None:
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
        shared = [e for e in narrower.values() if heads_of(e.site).module in names]
        kinds = {type(model.get_submodule(heads_of(e.site).module)) for e in shared}
        users = [name for name in names if type(model.get_submodule(name)) in kinds]
        found = {_sizes(e) for e in shared}
        if len(found) != 1 or {heads_of(e.site).module for e in shared} != set(users):
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
    heads, width, kept = heads_of(entry.site), entry.site.width, len(entry.kept)
    each = heads.queries_per_group
    return (each * width, width), (each * kept, kept), heads.head_dim
