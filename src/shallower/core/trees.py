"""Nested values with tensors in them: batches, arguments, outputs.

    tensors({"x": (a, [b])})                    # a, b
    mapped(torch.square, {"x": (a, [b])})       # {"x": (a * a, [b * b])}

Tuples, named tuples, lists and dicts are entered, and whatever else `torch.utils._pytree` knows (outputs of
Transformers among it), other mappings, dataclasses, and objects that hold tensors in attributes. Whatever is entered
keeps its type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

_LEAVES = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, type, nn.Module)


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in `tree`, in a fixed order.

    first = next(tensors(batch), None)
    """
    return _tensors(tree, ())


def mapped(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with f(t) in the place of each tensor t; what holds no tensor stays the very object.

    halves = mapped(lambda t: t.half(), batch)
    """
    return _replaced(f, tree, ())


def to_device(tree: Any, device: torch.device | str) -> Any:
    """`tree` with every tensor on `device`."""
    return mapped(lambda t: t.to(device), tree)


def cloned(tree: Any) -> Any:
    """`tree` with tensors of its own, without history: a model may write into them."""
    return mapped(lambda t: t.detach().clone(), tree)


def doubled(tree: Any) -> Any:
    """`tree` in double precision: float64 and complex128; whole numbers and masks stay."""
    return mapped(_double, tree)


def rows_of(tree: Any) -> int | None:
    """The size that dimension 0 of all tensors has in common; None where they differ, have none or cannot be cut."""
    found: int | None = None
    for tensor in tensors(tree):
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.dim() == 0:
            return None
        if found is not None and found != len(tensor):
            return None
        found = len(tensor)
    return found


def cut(tree: Any, rows: slice) -> Any:
    """These rows of every tensor in `tree`, views of it.

    first_half = cut(batch, slice(0, rows_of(batch) // 2))
    """

    def part(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        return tensor[rows]

    return mapped(part, tree)


def _tensors(tree: Any, around: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    opened = _taken_apart(tree)
    # objects may hold each other
    if opened is not None and id(tree) not in around:
        for item in opened[0]:
            yield from _tensors(item, (*around, id(tree)))


def _replaced(f: Callable[[Tensor], Any], tree: Any, around: tuple[int, ...]) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    opened = _taken_apart(tree)
    if opened is None or id(tree) in around:
        return tree
    items, rebuild = opened
    changed = [_replaced(f, item, (*around, id(tree))) for item in items]
    if all(new is old for new, old in zip(changed, items, strict=True)):
        return tree
    return rebuild(changed)


def _double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    if tensor.is_floating_point():
        return tensor.double()
    return tensor


def _taken_apart(value: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]] | None:
    """What `value` consists of, and how to build another from the same number of items; None if it is a leaf."""
    if value is None or isinstance(value, _LEAVES):
        return None
    if type(value) is tuple or type(value) is list:
        return value, type(value)
    if type(value) is dict:
        return list(value.values()), lambda changed: dict(zip(value, changed, strict=True))
    if isinstance(value, tuple) and hasattr(value, "_make"):  # past a `__new__` of its own, as of packed sequences
        return value, type(value)._make
    # one level only: what is inside is taken apart in its turn
    items, spec = _pytree.tree_flatten(value, is_leaf=lambda item: item is not value)
    if len(items) != 1 or items[0] is not value:
        return items, lambda changed: _pytree.tree_unflatten(changed, spec)
    if isinstance(value, Mapping):
        return list(value.values()), lambda changed: _with_entries(value, changed)
    if isinstance(value, list):
        return list(value), lambda changed: _with_items(value, changed)
    if isinstance(value, tuple):
        return list(value), type(value)
    return _taken_from_object(value)


def _with_entries(value: Mapping[Any, Any], changed: Sequence[Any]) -> Any:
    entries = dict(zip(value, changed, strict=True))
    if not isinstance(value, MutableMapping):
        return type(value)(entries)  # type: ignore[call-arg]
    other = copy.copy(value)
    for key, item in entries.items():
        other[key] = item
    return other


def _with_items(value: list[Any], changed: Sequence[Any]) -> list[Any]:
    other = copy.copy(value)
    other[:] = changed
    return other


def _has(value: Any, name: str) -> bool:
    """Whether an attribute can be read; a property may raise anything."""
    try:
        getattr(value, name)
    except Exception:
        return False
    return True


def _taken_from_object(value: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]] | None:
    """The attributes of an object that may hold tensors: all fields of a dataclass, else tensors and collections."""
    fields = getattr(value, "__dict__", None)
    if is_dataclass(value):
        names = [name for name in value.__dataclass_fields__ if _has(value, name)]
    elif isinstance(fields, dict):
        names = [name for name, item in fields.items() if isinstance(item, (Tensor, tuple, list, Mapping))]
    else:
        return None

    def rebuild(changed: list[Any]) -> Any:
        other = copy.copy(value)
        for name, item in zip(names, changed, strict=True):
            object.__setattr__(other, name, item)
        return other

    return [getattr(value, name) for name in names], rebuild
