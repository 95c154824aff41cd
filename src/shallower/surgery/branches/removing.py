"""A dropped branch as edits: its modules give zeros; a layer leaves its list."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from shallower.errors import PlanError
from shallower.modules.edits import Edit
from shallower.modules.prepared.absent import Absent
from shallower.modules.prepared.lists import Entries, is_uniform
from shallower.planning.entries import Entry
from shallower.sites import Branch
from shallower.surgery.branches.counting import settings_of_depth


def edits_of_branch(model: nn.Module, entry: Entry) -> list[Edit]:
    """The edits that take a branch or a layer away.

    Args:
        model: as the earlier steps left it; not changed.
        entry: of a branch.

    Raises:
        PlanError: the model has no such modules.
    """
    branch = entry.site.branch
    if branch is None:
        raise PlanError(f"{entry.site.name}: it is no branch")
    if branch.layer:
        return _without_layer(model, branch)
    found: list[Edit] = []
    for gone in branch.emptied:
        made = Absent(gone.module, gone.returns, cache=gone.cache, held=_first_tensor(model, gone.module))
        if gone.module == branch.closing:
            made = replace(made, channels=branch.channels, stride=branch.stride)
        found.append(made)
    return found


def _without_layer(model: nn.Module, branch: Branch) -> list[Edit]:
    """The list without the layer, where nothing knows its entries by their number; else what passes on what it reads.

    A list of several classes may be read by number, and a stock class makes as many layers as its config says.
    """
    (gone,) = branch.emptied
    list_name, _, key = gone.module.rpartition(".")
    holder = model.get_submodule(list_name)
    keys = list(holder._modules)
    kept = tuple(i for i, other in enumerate(keys) if other != key)
    settings = settings_of_depth(model, list_name, kept) if is_uniform(holder) else None
    if settings is None:
        held = _first_tensor(model, gone.module)
        return [Absent(gone.module, gone.returns, passes=True, cache=gone.cache, held=held)]
    return [*settings, Entries(list_name, kept, len(keys))]


def _first_tensor(model: nn.Module, name: str) -> str:
    return next(iter(model.get_submodule(name).state_dict()), "")
