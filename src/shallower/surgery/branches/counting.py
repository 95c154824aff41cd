"""A config that says how many layers there are follows them.

    settings_of_depth(model, "model.layers", kept)

Which of its numbers and lists say so is found by trying: the class must make of the changed config the very structure
that it makes of the present one with the layers taken away.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from shallower.errors import ShallowerError
from shallower.modules.edits import perform
from shallower.modules.prepared.lists import Entries, Settings
from shallower.saving.skeletons import sketch
from shallower.saving.stock.solving import Structure
from shallower.surgery.configs import StockPart, owners, settings_for

Keys = tuple[str, ...]
"""Where a value stands in a config."""

_MOST_TRIED = 24


def settings_of_depth(model: nn.Module, name: str, kept: Sequence[int]) -> list[Settings] | None:
    """What changes in the config of the stock model whose list of layers keeps some; None where it cannot say it.

    Nothing changes where the list is in no stock model.

    Args:
        model: before the layers go; not changed.
        name: of the list.
        kept: its entries that stay.
    """
    for owner in owners(model):
        inner = name.removeprefix(f"{owner.name}.") if owner.name else name
        if owner.name and inner == name:
            continue
        changed = _changed_config(owner, inner, kept)
        if changed is None:
            return None
        found = settings_for(owner, changed)
        return [replace(each, name=f"{owner.name}.{each.name}".strip(".")) for each in found]
    return []


def _changed_config(owner: StockPart, name: str, kept: Sequence[int]) -> dict[str, Any] | None:
    """The config with which the class has only these layers; None where there is none."""
    try:
        made = sketch(owner.source, owner.plain)
        count = len(list(made.get_submodule(name).children()))
        if max(kept) >= count:  # the list is another one by now
            return None
        perform(made, Entries(name, tuple(kept), count))
    except (ShallowerError, AttributeError):
        return None
    wanted = Structure.of(made)
    for tried, (number, lists) in enumerate(_candidates(owner.plain, count)):
        if tried == _MOST_TRIED:
            break
        config = copy.deepcopy(owner.plain)
        if number:
            _put(config, number, len(kept))
        for keys in lists:
            whole = _at(config, keys)
            _put(config, keys, [whole[i] for i in kept])
        found = owner.built(config)
        if found is not None and not found.differing(wanted) and not wanted.differing(found):
            return config
    return None


def _candidates(config: Mapping[str, Any], count: int) -> Iterator[tuple[Keys, list[Keys]]]:
    """A number that is the count and lists that are as long beside it, with them, without, and the lists alone."""
    numbers: list[Keys] = []
    lists: list[Keys] = []
    for keys, value in _leaves(config):
        if type(value) is int and value == count:
            numbers.append(keys)
        elif isinstance(value, (list, tuple)) and len(value) == count:
            lists.append(keys)
    # names that tell of layers first: others are tried, too
    numbers.sort(key=lambda keys: not any(word in keys[-1] for word in ("layer", "depth", "block")))
    for number in numbers:
        beside = [keys for keys in lists if keys[:-1] == number[:-1]]
        if beside:
            yield number, beside
        yield number, []
    if lists:
        yield (), lists


def _leaves(config: Mapping[str, Any], around: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*around, str(key)))
        else:
            yield (*around, str(key)), value


def _at(config: Any, keys: Keys) -> Any:
    for key in keys:
        config = config[key]
    return config


def _put(config: dict[str, Any], keys: Keys, value: Any) -> None:
    _at(config, keys[:-1])[keys[-1]] = value
