"""Whether the class of a library builds a model from its config alone, without the surgery that made it.

    print(stock_of(description, config, buffers))       # "the stock class loads this: BertModel.from_pretrained"

Found by building: the config is built as the library does it, and once more with the recorded surgery. The class loads
the model where both are the same modules with the same settings, their tensors have the shapes of the files, and
buffers that no state dict holds have their numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shallower.errors import ShallowerError
from shallower.modules.edits import replay
from shallower.modules.layers import kind_of
from shallower.saving.description import Description, Layout, Stock
from shallower.saving.skeletons import build_skeleton
from shallower.saving.slots import slots_of
from shallower.saving.stock.builders import call_that_builds
from shallower.saving.stock.solving import settings_of

NOTE = "_shallower_config"
"""Under this name a model remembers why its config does not say what its tensors are."""

_MOST_LETTERS = 2000


RAN = "_shallower_stock"
"""Under this name a model remembers that its class, built from its config, has answered as it does."""


def stock_of(
    description: Description,
    config: Mapping[str, Any] | None,
    buffers: Mapping[str, Tensor] | None = None,
    note: str = "",
    ran: bool = False,
) -> Stock:
    """What the class of a Transformers model makes of its config, compared with the model.

        stock_of(description, config).why       # "" where the class loads it

    Of a model of timm or torchvision that surgery changed: the call that builds it, as far as one is found. Of others,
    nothing.

    Args:
        description: of the saved model.
        config: as config.json has it.
        buffers: those of the model that no state dict holds; only their shapes are compared where None.
        note: what surgery found in trying other numbers in the config.
        ran: whether the class has answered as the model does; then forwards may have been written anew.
    """
    library, _, rest = description.source.partition(":")
    if library in ("timm", "torchvision") and description.edits:
        return _built_by_call(description)
    if library != "transformers" or config is None:
        return Stock()
    name = rest.partition("?")[0]
    try:
        stock = build_skeleton(description.source, config)
        ours = replay(build_skeleton(description.source, config), description.edits)
    except ShallowerError as error:
        return Stock(name, str(error)[:_MOST_LETTERS])
    entries = dict(description.buffers)
    for alias, first in description.names.items():
        entries[alias] = description.tensors[first]
    why = _other_tensors(stock, entries)
    why = (
        why
        or _tied_otherwise(stock, description.names)
        or _other_modules(stock, ours, ran)
        or _other_numbers(stock, buffers or {})
    )
    if why and note and _named(note) not in why:
        why = f"{note}; {why}"
    return Stock(name, why[:_MOST_LETTERS])


def _built_by_call(description: Description) -> Stock:
    """The call that builds a model of timm or torchvision; nothing where none is found."""
    try:
        ours = replay(build_skeleton(description.source), description.edits)
    except ShallowerError:  # `save` refuses it
        return Stock()
    made = call_that_builds(description.source, ours)
    if made is None:
        return Stock()
    with torch.device("meta"):
        again = replay(copy.deepcopy(made.model), description.edits)
    if _other_modules(made.model, again):
        return Stock()
    return Stock(made.text)


def _named(note: str) -> str:
    """What a note is about, as it would stand in the reason too."""
    return note.partition("`")[2].partition("`")[0] or note


def _other_tensors(stock: nn.Module, entries: Mapping[str, Layout]) -> str:
    """The first tensor that the config gives another shape, and how many more there are."""
    own = {name: tuple(slot.tensor.shape) for name, slot in slots_of(stock).items()}
    for name in (*entries, *own):
        if name not in own:
            return f"`{name}`: the model has it and its class does not"
        if name not in entries:
            return f"`{name}`: its class has it and the model does not"
    differing = [name for name, entry in entries.items() if own[name] != entry.shape]
    if not differing:
        return ""
    more = ""
    if len(differing) > 1:
        more = f" (and {len(differing) - 1} more)"
    name = differing[0]
    found, theirs = entries[name].shape, own[name]
    if len(found) != len(theirs):
        return f"`{name}` has shape {list(found)} where the config says {list(theirs)}{more}"
    axis = next(axis for axis, size in enumerate(found) if size != theirs[axis])
    said = f"where the config says {theirs[axis]}"
    widths = {entries[key].shape[axis] for key in own if _in_any_layer(key) == _in_any_layer(name)}
    if len(widths) > 1:
        said = f"where the config says one width for all layers, {theirs[axis]}"
    return f"`{name}` is {found[axis]} wide {said}{more}"


def _tied_otherwise(stock: nn.Module, names: Mapping[str, str]) -> str:
    """The first name whose tensor has other names in the class than in the model."""
    slots = slots_of(stock)
    firsts: dict[int, str] = {}
    for name, slot in slots.items():
        first = firsts.setdefault(id(slot.tensor), name)
        if names.get(first, first) != names.get(name, name):
            return f"`{first}` and `{name}` are one tensor in its class and two in the model"
        if slots[names.get(name, name)].tensor is not slot.tensor:
            return f"`{names[name]}` and `{name}` are two tensors in its class and one in the model"
    return ""


def _in_any_layer(name: str) -> str:
    """A name without its numbers: that of the same tensor in all layers."""
    return re.sub(r"\d+", "#", name)


def _other_modules(stock: nn.Module, ours: nn.Module, ran: bool = False) -> str:
    """The first module that surgery made something else than its class makes of the config."""
    known = dict(stock.named_modules())
    for name, module in ours.named_modules():
        if name not in known or _made_as(known[name]) != _made_as(module):
            return f"`{name}` is a {type(module).__name__} after surgery"
        if "forward" in vars(module) and "forward" not in vars(known[name]) and not ran:
            return f"`{name}` has another forward after surgery"
    own, made = settings_of(stock), settings_of(ours)
    for (name, attribute), value in made.items():
        if own.get((name, attribute), value) != value:
            return f"`{name}` has {attribute} = {value} where the config says {own[name, attribute]}"
    return ""


def _made_as(module: nn.Module) -> tuple[str, str]:
    """What it is: its class, by name as parametrised modules have one each, or the kind of linear map."""
    kind = type(module)
    if of_layer := kind_of(module):
        return "", of_layer
    return kind.__module__, kind.__qualname__


def _other_numbers(stock: nn.Module, buffers: Mapping[str, Tensor]) -> str:
    """The first buffer that is in no state dict, and so has the numbers that the class computes."""
    for name, computed in _transient(stock):
        own = buffers.get(name)
        if own is None or own.is_meta or computed.is_meta or computed.shape != own.shape:
            continue
        if not torch.equal(computed.to(own.dtype), own.cpu()):
            return f"`{name}` has other numbers than its class computes"
    return ""


def _transient(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, slot in slots_of(model).items():
        if slot.kind == "transient":
            yield name, slot.tensor
