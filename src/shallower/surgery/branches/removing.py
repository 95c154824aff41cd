"""A dropped branch as edits: its modules give zeros; a layer leaves its list."""

from __future__ import annotations

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
        if gone.module == branch.closing:
            found.append(Absent(gone.module, gone.returns, branch.channels, branch.stride))
        else:
            found.append(Absent(gone.module, gone.returns))
    return found


def _without_layer(model: nn.Module, branch: Branch) -> list[Edit]:
    """The list without the layer, where all its entries are of one class; else something that passes on what it reads.

    Whatever reads a list of several classes may know its entries by their numbers.
    """
    (gone,) = branch.emptied
    list_name, _, key = gone.module.rpartition(".")
    holder = model.get_submodule(list_name)
    keys = list(holder._modules)
    if not is_uniform(holder):
        return [Absent(gone.module, gone.returns, passes=True)]
    kept = tuple(i for i, other in enumerate(keys) if other != key)
    return [*settings_of_depth(model, list_name, kept), Entries(list_name, kept, len(keys))]
