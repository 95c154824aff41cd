"""Lists of modules that lose entries: the experts of a mixture.

perform(model, Entries("layers.3.experts", (0, 2, 5)))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torch import nn

from shallower.core.codec import Bounds
from shallower.errors import PlanError
from shallower.modules.records import rename


@dataclass(frozen=True)
class Entries:
    """A list of modules keeps some of its entries, which are numbered anew; of a dict the first keys are used again.

    Attributes:
        name: of the list.
        kept: entries as they are numbered before, ascending.
    """

    name: Annotated[str, Bounds(1, 1000)]
    kept: Annotated[tuple[Annotated[int, Bounds(0, 2**24)], ...], Bounds(1, 2**16)]
    edit: Literal["entries"] = field(default="entries", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Leave the others out."""
        holder = model.get_submodule(self.name)
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            raise PlanError(f"`{self.name}` is a {type(holder).__name__}, not a list of modules")
        entries = dict(holder._modules)
        keys = list(entries)
        if list(self.kept) != sorted(set(self.kept)) or self.kept[-1] >= len(keys):
            raise PlanError(f"`{self.name}` has {len(keys)} entries, and these are not some of them: {self.kept}")
        holder._modules.clear()
        renamed: dict[str, str] = {}
        for key, i in zip(keys, self.kept, strict=False):
            holder._modules[key] = entries[keys[i]]
            renamed[keys[i]] = key
        rename(holder, renamed)
