"""A config that says how many layers there are follows them.

    settings_of_depth(model, "model.layers", kept)

Which of its numbers and lists say so is found by trying: the class must make of the changed config the very structure
that it makes of the present one with the layers taken away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

from torch import nn

from shallower.errors import ShallowerError
from shallower.modules.edits import perform
from shallower.modules.prepared.lists import Entries, Settings
from shallower.saving.skeletons import sketch
from shallower.saving.stock.solving import Spot, Structure, with_numbers
from shallower.surgery.configs import StockPart, owners, settings_for

Keys = tuple[str | int, ...]
"""Where a value stands in a config, or in a list there."""

_OF_STAGES = ("stage_names", "out_features", "out_indices")
"""What a config of Transformers says of a backbone's stages, and makes of the number of layers where it does not."""

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
    for config in islice(_candidates(owner.plain, count, kept), _MOST_TRIED):
        found = owner.built(config)
        if found is not None:
            differing = found.differing(wanted) | wanted.differing(found)
            inside = f"{name}."
            if all(_config_follows(spot, found, wanted) and not spot[0].startswith(inside) for spot in differing):
                return config
    return None


def _config_follows(spot: Spot, found: Structure, wanted: Structure) -> bool:
    """Whether a difference is that a module holds how many layers there are, or of which types."""
    own, other = found.settings.get(spot), wanted.settings.get(spot)
    if isinstance(own, (tuple, list)) and isinstance(other, (tuple, list)):
        return set(own) <= set(other)
    return type(own) is int and type(other) is int and own < other


def _candidates(config: Mapping[str, Any], count: int, kept: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Configs in which a number is that of the layers that stay, and lists of as many as there were keep their parts.

    Any of these lists may be another's; and stages that are named after layers may get their names anew.
    """
    numbers: list[Keys] = []
    lists: list[Keys] = []
    for keys, value in _leaves(config):
        if type(value) is int and value == count:
            numbers.append(keys)
        elif isinstance(value, (list, tuple)) and len(value) == count:
            lists.append(keys)
    # names that tell of layers first: others are tried, too
    numbers.sort(key=lambda keys: not any(word in str(keys) for word in ("layer", "depth", "block")))
    for number in [*numbers, ()]:
        beside = [keys for keys in lists if not number or keys[:-1] == number[:-1]]
        for size in range(len(beside), -1, -1):
            for some in combinations(beside, size):
                made = with_numbers(config, {number: len(kept)} if number else {})
                for keys in some:
                    _value_at(made, keys[:-1])[keys[-1]] = [_value_at(config, keys)[i] for i in kept]
                if number or some:
                    yield made
                if number and any(key in made for key in _OF_STAGES):
                    yield {key: value for key, value in made.items() if key not in _OF_STAGES}


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[Keys, Any]]:
    """Everything in a config that is no mapping: lists, and what is in them."""
    waiting: deque[tuple[Keys, Any]] = deque([((), config)])
    while waiting:
        keys, value = waiting.popleft()
        parts: Iterable[tuple[str | int, Any]] = ()
        if isinstance(value, Mapping):
            parts = value.items()
        else:
            yield keys, value
            if isinstance(value, list):
                parts = enumerate(value)
        waiting += [((*keys, key), part) for key, part in parts]


def _value_at(config: Any, keys: Keys) -> Any:
    for key in keys:
        config = config[key]
    return config
