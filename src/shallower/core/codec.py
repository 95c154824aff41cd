"""Dataclasses as plain data for files, and back with everything checked.

    @dataclass(frozen=True)
    class Point:
        name: Annotated[str, Bounds(1, 80)]
        size: Annotated[int, Bounds(0, 1 << 40)]
        kind: Literal["linear", "conv2d"] = "linear"

    data = encode(Point("a", 3))                # {"name": "a", "size": 3, "kind": "linear"}
    point = decode(Point, data, at="points.json", error=CheckpointError)

What a field may hold is said once, by its type: bool, int, float, str, None, Any, Literal, Annotated with `Bounds`,
tuples, lists, mappings from texts, unions, and dataclasses of these. A union of dataclasses is told apart by a field
that is a Literal and no argument of the constructor. Fields with a default may be missing, so that files of earlier
versions are read; unknown ones are errors.
"""

from __future__ import annotations

import collections.abc
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shallower.errors import ShallowerError

T = TypeVar("T")

_MOST_WHOLE = 1 << 53
"""Whole numbers beyond it are not the same in every reader of JSON."""

_SCALARS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
}


@dataclass(frozen=True)
class Bounds:
    """Within which a number lies, or how long a text, list or mapping is; for `Annotated`."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"from {self.least} to {self.most}"


Special = Mapping[type, Callable[[Any, str], Any]]
"""For types of one's own: called with a value and where it stands."""


def encode(value: Any, *, special: Special | None = None, at: str = "") -> Any:
    """Plain data of dicts, lists, numbers and texts for a value.

    Args:
        value: what is to be written.
        special: how types of one's own, such as tensors, are written.
        at: where the value stands, for `special`: fields and indices joined by dots.
    """
    for kind, write in (special or {}).items():
        if isinstance(value, kind):
            return write(value, at)
    if is_dataclass(value):
        cls: Any = type(value)
        return {
            name: encode(getattr(value, name), special=special, at=_below(at, name)) for name in _fields_in_files(cls)
        }
    if isinstance(value, Mapping):
        return {key: encode(item, special=special, at=_below(at, key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item, special=special, at=_below(at, i)) for i, item in enumerate(value)]
    return value


def decode(
    cls: type[T] | Any, data: Any, *, at: str, error: type[ShallowerError], special: Special | None = None
) -> T | Any:
    """The value of type `cls` that `encode` wrote.

    Args:
        cls: any type that the module's docstring names.
        data: plain data, from a file that may hold anything.
        at: where the data come from, for errors.
        error: the class to raise.
        special: how types of one's own are read; it may raise `error` itself.

    Raises:
        error: the data are not of this type; it says where and what is expected.
    """
    try:
        return _Reader(special or {}).read(cls, data, at)
    except _MismatchError as mismatch:
        raise error(str(mismatch)) from None


def field_names(cls: Any) -> frozenset[str]:
    """The names of a dataclass's fields."""
    return frozenset(f.name for f in fields(cls))


def known_fields(cls: Any, data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """What data of another version have for the fields of a dataclass; the rest, and what is null, is left out.

        known_fields(Cost, {"memory": 4, "colour": "red"}, {"memory": "size"})      # {"size": 4}

    Args:
        cls: the dataclass.
        data: plain data.
        renamed: fields that had another name, by that name.
    """
    names = field_names(cls)
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = renamed.get(key, key)
        if name in names and value is not None:
            found[name] = value
    return found


class _MismatchError(Exception):
    def __init__(self, at: str, data: Any, expected: str) -> None:
        super().__init__(f"{at}: {_shown(data)} is not {expected}")


class _Reader:
    def __init__(self, special: Special) -> None:
        self.special = special

    def read(self, hint: Any, data: Any, at: str) -> Any:
        """The value of one place."""
        if hint in self.special:
            return self.special[hint](data, at)
        if hint is Any:
            return data
        if hint is None:
            hint = type(None)
        if hint in _SCALARS:
            return _scalar(hint, data, at)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.instance(hint, data, at)
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.bounded(arguments, data, at)
        if origin is Literal:
            for known in arguments:
                if known == data and type(known) is type(data):
                    return known
            raise _MismatchError(at, data, f"one of {', '.join(map(repr, arguments))}")
        if origin in (Union, types.UnionType):
            return self.one_of(arguments, data, at)
        if origin is tuple:
            return self.items(arguments, data, at)
        if origin in (list, collections.abc.Sequence):
            items = self.items((arguments[0], ...), data, at)
            if origin is list:
                return list(items)
            return items
        if origin in (dict, collections.abc.Mapping):
            return self.entries(arguments, data, at)
        raise TypeError(f"{hint} is not a type of a field in a file")

    def bounded(self, arguments: tuple[Any, ...], data: Any, at: str) -> Any:
        hint, *notes = arguments
        value = self.read(hint, data, at)
        for bounds in notes:
            if isinstance(bounds, Bounds) and value is not None:
                size, what = value, "a number"
                if hasattr(value, "__len__"):
                    size, what = len(value), "of length"
                if not bounds.least <= size <= bounds.most:
                    raise _MismatchError(at, data, f"{what} {bounds}")
        return value

    def items(self, arguments: tuple[Any, ...], data: Any, at: str) -> tuple[Any, ...]:
        if not isinstance(data, (list, tuple)):
            raise _MismatchError(at, data, "a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(data)
        if len(arguments) != len(data):
            raise _MismatchError(at, data, f"a list of {len(arguments)}")
        pairs = enumerate(zip(arguments, data, strict=True))
        return tuple(self.read(hint, item, f"{at}[{i}]") for i, (hint, item) in pairs)

    def entries(self, arguments: tuple[Any, ...], data: Any, at: str) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            raise _MismatchError(at, data, "an object")
        key_hint, hint = arguments
        found = {}
        for key, item in data.items():
            found[self.read(key_hint, key, f"{at}: the key")] = self.read(hint, item, f"{at}.{_shortened(key)}")
        return found

    def one_of(self, arguments: tuple[Any, ...], data: Any, at: str) -> Any:
        kinds = [hint for hint in arguments if hint not in (None, type(None))]
        if data is None and len(kinds) < len(arguments):
            return None
        if len(kinds) == 1:
            return self.read(kinds[0], data, at)
        tagged = {tag: kind for kind in kinds for tag in _tags(kind)}
        if isinstance(data, Mapping):
            for (name, value), kind in tagged.items():
                if name in data and data[name] == value:
                    return self.read(kind, data, at)
        # what has no tag is tried in turn: the first kind that the data fit
        mismatches = []
        for kind in kinds:
            if kind not in tagged.values():
                try:
                    return self.read(kind, data, at)
                except _MismatchError as mismatch:
                    mismatches.append(mismatch)
        if len(mismatches) == 1 and not tagged:
            raise mismatches[0]
        known = [f"{name} {value!r}" for name, value in tagged] or ["any of the kinds it may be"]
        raise _MismatchError(at, data, " or ".join(known))

    def instance(self, cls: Any, data: Any, at: str) -> Any:
        if not isinstance(data, Mapping):
            raise _MismatchError(at, data, "an object")
        hints, known = _hints(cls), _fields_in_files(cls)
        unknown = [str(key) for key in data if key not in known]
        if unknown:
            raise _MismatchError(at, unknown[0], f"a key of {cls.__name__}")
        values = {}
        for name, f in known.items():
            if name in data:
                value = self.read(hints[name], data[name], _below(at, name))
                if f.init:
                    values[name] = value
            elif not f.init or (f.default is MISSING and f.default_factory is MISSING):
                raise _MismatchError(at, dict(data), f"complete: `{name}` is missing")
        try:
            return cls(**values)
        except (ValueError, TypeError, RuntimeError) as error:
            raise _MismatchError(at, dict(data), f"a {cls.__name__}: {error}") from None


def _scalar(hint: type, data: Any, at: str) -> Any:
    if isinstance(data, int) and abs(data) > _MOST_WHOLE:
        raise _MismatchError(at, f"a number of {data.bit_length()} bits", _SCALARS[hint])
    # JSON writes 1.0 as 1 in some languages; the other way round nothing is converted
    if hint is float and type(data) is int:
        data = float(data)
    if type(data) is not hint or (isinstance(data, float) and not math.isfinite(data)):
        raise _MismatchError(at, data, _SCALARS[hint])
    return data


def _tags(kind: Any) -> list[tuple[str, Any]]:
    """The fields, with their values, by which a dataclass is told apart in a union."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return []
    tags = []
    for name, f in _fields_in_files(kind).items():
        if not f.init:
            tags += [(name, value) for value in get_args(_hints(kind)[name])]
    return tags


@cache
def _fields_in_files(cls: Any) -> Mapping[str, Field[Any]]:
    """What the constructor takes, and before it what tells the kind."""
    hints = _hints(cls)
    tags, taken = {}, {}
    for f in fields(cls):
        if f.init:
            taken[f.name] = f
        elif get_origin(hints[f.name]) is Literal:
            tags[f.name] = f
    return tags | taken


@cache
def _hints(cls: Any) -> dict[str, Any]:
    known = get_type_hints(cls, include_extras=True)
    return {f.name: known[f.name] for f in fields(cls)}


def _below(at: str, name: object) -> str:
    if not at:
        return str(name)
    return f"{at}.{name}"


def _shortened(key: object) -> str:
    return str(key)[:80]


def _shown(data: Any) -> str:
    if isinstance(data, Mapping):
        return "the object"
    if isinstance(data, (list, tuple)):
        return f"a list of {len(data)}"
    text = repr(data)
    if len(text) > 80:
        return f"{text[:80]}..."
    return text
