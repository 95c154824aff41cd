"""Where a model keeps modules besides the attributes that PyTorch knows.

Surgery copies a model and exchanges modules by their names. A function with a module in its closure is not copied, so
that the copy would run the original's layers; a list keeps a layer whose name another one has taken.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shallower.errors import SiteError


def check_copyable(model: nn.Module) -> None:
    """Check that a deep copy of the model runs its own modules.

    Raises:
        SiteError: a function that is set on one of its modules keeps a module itself.
    """
    names = {module: name for name, module in reversed([*model.named_modules()])}
    for module, name in names.items():
        for key, value in _own_attributes(module):
            kept = next((other for other in _shared_by_copies(value, False, ()) if other in names), None)
            if kept is None:
                continue
            where = f"`{name}`" if name else type(model).__name__
            what = f"`{names[kept]}`" if names[kept] else "the model"
            raise SiteError(
                f"{where}: its attribute `{key}` is a function that was set on this instance and runs {what} itself, "
                f"so that a copy of the model would run the original's layers. Take it off (`del module.{key}`) and "
                "set it again on the result, for example small.forward = torch.compile(small.forward)"
            )


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that lists, tuples and dicts in attributes hold, and which: "the list `layers` of `head`"."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for key, value in _own_attributes(module):
            for held in _members(value, 3):
                owner = f"`{name}`" if name else "the model"
                found.setdefault(held, f"the {type(value).__name__} `{key}` of {owner}")
    return found


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        own = key.startswith("_shallower") or key.endswith("_hooks") or key in ("_modules", "_parameters", "_buffers")
        # torch.compile(module) is copied by building it anew
        if not own and not (key == "forward" and "_orig_mod" in module._modules):
            yield key, value


def _members(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)) and depth:
        for item in value:
            if isinstance(item, nn.Module):
                yield item
            else:
                yield from _members(item, depth - 1)


def _shared_by_copies(value: Any, shared: bool, seen: tuple[int, ...]) -> Iterator[nn.Module]:
    """The modules that a copy of `value` would share with it; `shared` says whether `value` itself is not copied."""
    if id(value) in seen:
        return
    seen = (*seen, id(value))
    inner: list[Any] = []
    if isinstance(value, nn.Module):
        if shared:
            yield value
    elif isinstance(value, types.FunctionType):
        shared = True
        inner = [*_closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        inner += vars(value).values()
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.values())
    for item in inner:
        yield from _shared_by_copies(item, shared, seen)


def _closed_over(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not set yet
            continue
    return found
