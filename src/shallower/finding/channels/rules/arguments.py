"""The arguments of a recorded call, by name or by place.

    weight = tensor(call, 1, "weight")
    groups = integer(call, 6, "groups", 1)

A method's tensor has place 0 like that of the function of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shallower.finding.channels.following import UnknownUseError
from shallower.recording.tracing import Call, Value


def given(call: Call, place: int, *names: str) -> Any:
    """An argument; None where it is left out."""
    if place < len(call.args):
        return call.args[place]
    for name in names:
        if name in call.kwargs:
            return call.kwargs[name]
    return None


def optional(call: Call, place: int, *names: str) -> Value | None:
    """An argument that is a tensor, or None."""
    value = given(call, place, *names)
    return value if isinstance(value, Value) else None


def tensor(call: Call, place: int, *names: str) -> Value:
    """An argument that has to be a tensor."""
    value = given(call, place, *names)
    if not isinstance(value, Value):
        raise UnknownUseError
    return value


def integer(call: Call, place: int, name: str, default: int | None = None) -> int:
    """An argument that has to be a whole number."""
    value = given(call, place, name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnknownUseError
    return value


def integers(value: Any) -> list[int]:
    """One whole number, or several."""
    items = value if isinstance(value, (tuple, list)) else [value]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise UnknownUseError
    return list(items)


def of_axis(value: Any, axis: int, default: int) -> int:
    """What is given once for all axes of an image, or for each of them."""
    if value is None or isinstance(value, str):
        return default
    items = integers(value)
    return items[axis if len(items) > 1 else 0]


def dimensions(call: Call, count: int, place: int = 1, *, names: Iterable[str] = ("dim", "dims", "axis")) -> list[int]:
    """The dimensions that a call is about: one, several, or one by one; all where none is given."""
    value = given(call, place, *names)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [item for item in call.args[place:] if isinstance(item, int) and not isinstance(item, bool)] or [value]
    if value is None or isinstance(value, bool) or (isinstance(value, (tuple, list)) and not value):
        return list(range(count))
    return [dim % count for dim in integers(value)]


def values(call: Call, place: int, *names: str) -> list[Value]:
    """An argument that has to be a sequence of tensors."""
    items = given(call, place, *names)
    if isinstance(items, Value):
        items = call.args[place:]
    elif not isinstance(items, (tuple, list)):
        raise UnknownUseError
    found = [item for item in items if isinstance(item, Value)]
    if not found or len(found) != len(items):
        raise UnknownUseError
    return found
