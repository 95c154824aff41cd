"""What surgery did to a model, remembered by the modules that it changed.

    note(edit, changed, before)
    for name, edit in noted(model): ...

Every module carries the edits that made it what it is, so they go where it goes: into a larger model, out of a larger
one, behind a wrapper or an adapter. A stamp keeps them in the order in which they were performed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_OWN = "_shallower_edits"
_CHILDREN = "_shallower_edited"
# Stamps of a later process are greater, so that parts which several processes made can be put together.
_stamps = itertools.count(time.time_ns())


def note(edit: Any, changed: nn.Module, before: nn.Module, owner: nn.Module | None = None, child: str = "") -> None:
    """Remember that `edit` made `changed` of `before`; they are one module where it was changed in place.

    Args:
        edit: any value.
        changed: what stands at the place now.
        before: what stood there; its own edits came first and go over to `changed`.
        owner: whose child it is, where it was exchanged.
        child: the name of that child.
    """
    stamp = next(_stamps)
    earlier = vars(before).pop(_OWN, ())
    vars(changed)[_OWN] = (*earlier, (stamp, edit))
    if owner is not None:
        vars(owner)[_CHILDREN] = {**vars(owner).get(_CHILDREN, {}), child: stamp}


def forget(module: nn.Module) -> None:
    """Forget what was done to a module and all its parts: they are copies, made again by a later edit."""
    for part in module.modules():
        vars(part).pop(_OWN, None)
        vars(part).pop(_CHILDREN, None)


def rename(owner: nn.Module, renamed: Mapping[str, str]) -> None:
    """Children of a module have other names now, or are no more."""
    stamps = vars(owner).pop(_CHILDREN, {})
    if stamps:
        vars(owner)[_CHILDREN] = {renamed[child]: stamp for child, stamp in stamps.items() if child in renamed}


def noted(model: nn.Module) -> list[tuple[str, Any]]:
    """The edits that made the model and its parts, in order: (where the changed module stands now, edit)."""
    found = []
    for name, module in model.named_modules():
        for stamp, edit in vars(module).get(_OWN, ()):
            found.append((stamp, name, edit))
    found.sort(key=lambda item: item[0])
    return [(name, edit) for _, name, edit in found]


def exchanged(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that somebody put in the place of one that surgery had made, with their dotted names."""
    for prefix, owner in model.named_modules():
        for child, stamp in vars(owner).get(_CHILDREN, {}).items():
            module = getattr(owner, child, None)
            if isinstance(module, nn.Module) and not _holds(module, stamp):
                yield f"{prefix}.{child}" if prefix else child, module


def _holds(module: nn.Module, stamp: int) -> bool:
    """Whether an edit's module stands here, perhaps inside a wrapper."""
    return any(stamp in dict(vars(part).get(_OWN, ())) for part in module.modules())
