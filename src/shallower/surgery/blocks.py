"""Surgery on a model in a narrow type whose float32 copy would not fit into memory: proven block by block.

    small = block_by_block(model, steps(plan.entries), Pass(inputs), edits_of_step)

A block is the smallest part of the model that holds all of a site, or of several that lie in one another. Each runs in
float32 on the inputs that it has in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from shallower.core.trees import cloned
from shallower.core.watching import watching
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import lent
from shallower.planning.forms import Step
from shallower.sites import Place, Site, by_name
from shallower.surgery.observing import Pass
from shallower.surgery.whole import (
    LOOSE,
    EditsOf,
    after_surgery,
    check_distance,
    check_rounded,
    distance,
    is_narrow,
    simulated,
    whole_network,
    wide_enough,
    widen,
)

M = TypeVar("M", bound=nn.Module)


def block_by_block(model: M, todo: Sequence[Step], run: Pass, edits_of: EditsOf) -> M:
    """The model after surgery, each block proven in float32 and then rounded.

    Args:
        model: untouched.
        todo: the steps of a plan.
        run: of the whole model.
        edits_of: what surgery does.

    Raises:
        SurgeryError: the result differs from the simulated model beyond rounding.
    """
    small = detached_copy(model)
    blocks = _steps_by_block(model, todo)
    calls = _calls(model, list(blocks), run)
    if not all(calls.values()):
        # a list of modules, or one whose forward the model does not call: all of it is one block
        blocks = {"": list(todo)}
    for part, steps in blocks.items():
        inputs = run.inputs if part == "" else calls.pop(part)
        others = lent(model.parameters())
        for own in model.get_submodule(part).parameters():
            del others[id(own)]
        wide = detached_copy(model, others)
        widen(wide.get_submodule(part))
        exact = whole_network(wide, steps, Pass(inputs, part).converted(wide_enough), edits_of, small)
        check_rounded(exact.get_submodule(part), small.get_submodule(part))
    dtype = next(filter(is_narrow, model.parameters())).dtype
    error = distance(simulated(model, todo, run, ()), after_surgery(small, todo, run, ()))
    check_distance(error, 2 * LOOSE * torch.finfo(dtype).eps, dtype)
    return small


def _steps_by_block(model: nn.Module, todo: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps by the part of the model that holds all of their sites."""
    blocks: dict[str, list[Step]] = {}
    parts = [_part_of(model, step.entry.site) for step in todo]
    for step, part in zip(todo, parts, strict=True):
        around = [outer for outer in parts if _is_around(outer, part)]
        blocks.setdefault(min(around, key=len), []).append(step)
    return blocks


def _is_around(outer: str, inner: str) -> bool:
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def _part_of(model: nn.Module, site: Site) -> str:
    """The smallest part that holds all modules of a site and can be called."""
    places = [*map(Place, (*by_name(site.maps), *site.bridge.norms)), *site.bridge.activations, *site.dropouts]
    places += [Place(module) for module in {slot.module for slot in site.slots}]
    places += [Place(listed.module) for listed in site.lists]
    if site.branch is not None:
        places += [Place(gone.module) for gone in site.branch.emptied]
    # a number that a module holds is read by its forward
    places += [Place(module, (("forward", 0),)) for module in {f.module for f in site.followers}]
    if site.residual is not None:
        places += [site.residual.place, Place(site.residual.norm or site.maps[0].name)]
    holders: list[str] = []
    for place in places:
        # of a call, the module whose forward makes it; of a module, what holds it
        holder = place.module
        if not place.calls:
            holder = holder.rpartition(".")[0]
        holders.append(holder)
    part = holders[0]
    while not all(_is_around(part, holder) for holder in holders):
        part = part.rpartition(".")[0]
    while isinstance(model.get_submodule(part), (nn.ModuleList, nn.ModuleDict)):
        part = part.rpartition(".")[0]
    return part


def _calls(model: nn.Module, parts: Sequence[str], run: Pass) -> dict[str, list[Any]]:
    """The arguments of all calls of these parts in one pass over the model."""
    calls: dict[str, list[Any]] = {part: [] for part in parts}
    with watching(model, before={part: _arguments_to(calls[part]) for part in parts}):
        run.over(model)
    return calls


def _arguments_to(calls: list[Any]) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((cloned(args), cloned(kwargs)))

    return keep
