"""Lists of modules that lose entries: the experts of a mixture, the layers of a network.

perform(model, Entries("layers.3.experts", (0, 2, 5)))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import nn

from shallower.core.codec import Bounds
from shallower.errors import PlanError
from shallower.modules.prepared.absent import SIZES
from shallower.modules.records import rename


@dataclass(frozen=True)
class Entries:
    """A list of modules keeps some of its entries, which are numbered anew; of a dict the first keys are used again.

    A whole number that each entry or a part of it holds and that is the number of the entry (`layer_idx`) follows.

    Attributes:
        name: of the list.
        kept: entries as they are numbered before, ascending.
        total: how many there are before, 0 where that does not matter. A list that has fewer already, since a config
            says so from which it was built, stays as it is.
    """

    name: Annotated[str, Bounds(1, 1000)]
    kept: Annotated[tuple[Annotated[int, Bounds(0, 2**24)], ...], Bounds(1, 2**16)]
    total: Annotated[int, Bounds(0, 2**24)] = 0
    edit: Literal["entries"] = field(default="entries", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Leave the others out."""
        holder = model.get_submodule(self.name)
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            raise PlanError(f"`{self.name}` is a {type(holder).__name__}, not a list of modules")
        entries = dict(holder._modules)
        keys = list(entries)
        if len(keys) < self.total:
            return
        if list(self.kept) != sorted(set(self.kept)) or self.kept[-1] >= len(keys):
            raise PlanError(f"`{self.name}` has {len(keys)} entries, and these are not some of them: {self.kept}")
        counting = numbering(entries.values())
        holder._modules.clear()
        renamed: dict[str, str] = {}
        for key, i in zip(keys, self.kept, strict=False):
            holder._modules[key] = entries[keys[i]]
            renamed[keys[i]] = key
        rename(holder, renamed)
        for i, entry in enumerate(holder._modules.values()):
            parts = {} if entry is None else dict(entry.named_modules())
            for name, attribute in counting:
                if name in parts and attribute in vars(parts[name]):
                    setattr(parts[name], attribute, i)


def is_uniform(holder: nn.Module) -> bool:
    """Whether a list may lose an entry: it has several, all of one class, which nothing knows by their numbers."""
    entries = list(holder.children())
    return len(entries) > 1 and len({type(entry) for entry in entries}) == 1


def numbering(entries: Iterable[nn.Module | None]) -> list[tuple[str, str]]:
    """The whole numbers that are the number of each entry, by the name of the part that holds them, and their own.

    numbering(model.layers)         # [("self_attn", "layer_idx")]

    Entries may lack such a part, as those of attention and others in one list do. An attribute counts that is the
    number of all entries, or of three, and so cannot be another number by chance.
    """
    given = list(entries)
    found: dict[tuple[str, str], list[int]] = {}
    others: set[tuple[str, str]] = set()
    for i, entry in enumerate(given):
        for name, part in () if entry is None else entry.named_modules():
            for attribute, value in vars(part).items():
                if type(value) is int and attribute not in SIZES:
                    found.setdefault((name, attribute), []).append(i)
                    if value != i:
                        others.add((name, attribute))
    numbered: dict[str, set[int]] = {"cache": {0, 1, 2}}
    for (name, attribute), own in found.items():
        if (name, attribute) not in others:
            numbered.setdefault(attribute, set()).update(own)
    return sorted(key for key in found if key not in others and len(numbered[key[1]]) >= min(3, max(2, len(given))))


@dataclass(frozen=True, eq=False)
class Settings:
    """Values in the config that a module holds. Not recorded: files hold a model's config anyway.

    Attributes:
        name: of the module.
        values: each with the keys that lead to it.
    """

    name: str
    values: tuple[tuple[tuple[str, ...], Any], ...]

    def perform(self, model: nn.Module) -> None:
        """Set them."""
        for keys, value in self.values:
            holder = self._holder(model, keys)
            if isinstance(holder, dict):
                holder[keys[-1]] = value
            else:
                setattr(holder, keys[-1], value)

    def now(self, model: nn.Module) -> Settings:
        """The values that a model has there."""
        found: list[tuple[tuple[str, ...], Any]] = []
        for keys, _ in self.values:
            holder = self._holder(model, keys)
            if isinstance(holder, dict):
                found.append((keys, holder.get(keys[-1])))
            else:
                found.append((keys, getattr(holder, keys[-1], None)))
        return Settings(self.name, tuple(found))

    def _holder(self, model: nn.Module, keys: tuple[str, ...]) -> Any:
        holder = vars(model.get_submodule(self.name))["config"]
        for key in keys[:-1]:
            holder = holder[key] if isinstance(holder, dict) else getattr(holder, key)
        return holder
