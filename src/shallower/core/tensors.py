"""What tensors and functions hold, by which they are told apart, and whether a tensor holds anything."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_READ_GLOBALLY = (bool, int, float, str, tuple, Tensor, types.FunctionType)
"""Kinds of global values by which functions that read them are told apart."""


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether this is a meta or fake tensor."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def are_finite(given: Iterable[Tensor]) -> bool:
    """Whether every number in these tensors is finite."""
    return all(bool(t.isfinite().all()) for t in given)


def nbytes_of(given: Iterable[Tensor]) -> int:
    """Bytes that the numbers of these tensors take, all together."""
    return sum(t.numel() * t.element_size() for t in given)


def content(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as bytes in logical order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    # as bytes, since NumPy does not know every dtype (bfloat16)
    return flat.view(torch.uint8).numpy().data


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names and types.

    hash_of_weights(model)              # "9f86d0..."
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content(tensor))
    return digest.hexdigest()


def told_apart(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Plain data that differ where the value does; of a function its code, and what it encloses or finds globally.

        told_apart(options.output_of)

    Each object is described once, and named by its number where it comes again.
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    seen = {} if seen is None else seen
    if id(value) in seen:
        return f"object {seen[id(value)]}"
    seen[id(value)] = len(seen)
    inside = partial(told_apart, seen=seen)
    if isinstance(value, Tensor):
        return hashlib.sha256(content(value)).hexdigest()
    if isinstance(value, (tuple, list)):
        return list(map(inside, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))  # their order differs from process to process
    if isinstance(value, Mapping):
        return list(map(inside, list(value.items())))
    if isinstance(value, partial):
        return list(map(inside, (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return [inside(value.__func__), inside(value.__self__)]
    if isinstance(value, types.FunctionType):
        enclosed = list(map(_cell, value.__closure__ or ()))
        own: dict[str, Any] = {}
        for name in value.__code__.co_names:
            item = value.__globals__.get(name)
            if isinstance(item, _READ_GLOBALLY):
                own[name] = item
        return [_code(value.__code__), inside(enclosed), inside(value.__defaults__), inside(own)]
    named = [type(value).__module__, type(value).__qualname__, str(getattr(value, "__qualname__", ""))]
    if isinstance(value, (type, types.ModuleType)) or not hasattr(value, "__dict__"):
        return named
    return [*named, inside(vars(value))]


def _cell(cell: types.CellType) -> Any:
    """What a function encloses; None for a name that has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _code(code: types.CodeType) -> str:
    """A hash of what a function's code does, without its place in a file."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            digest.update(_code(constant).encode())
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())  # their order differs from process to process
        else:
            digest.update(repr(constant).encode())
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    return digest.hexdigest()
