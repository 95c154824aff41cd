"""Options that belong together: a frozen dataclass whose fields say what they mean and what they may be.

    @dataclass(frozen=True)
    class Training(Options):
        epochs: int = option(3, "Passes over the data.", least=1)
        precision: Literal["no", "bf16"] = option("no", "Training precision.")

    Training(epochs=0)          # MethodError: epochs=0: at least 1

The command line makes its options of such fields: one with a text is one of its options. No PyTorch is needed here.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from shallower.errors import MethodError, ShallowerError


def option(
    default: Any = dataclasses.MISSING,
    text: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flags: tuple[str, ...] = (),
    metavar: str = "",
) -> Any:
    """A field of a dataclass of options.

        seed: int = option(0, "Random seed.", least=0)

    Args:
        default: its value where nothing else is given; without one the field must be given.
        text: its help; the command line has an option for every field with one.
        least, most: bounds, both included.
        above, below: bounds, both excluded.
        flags: what the command line calls it, where that is not `--name-of-the-field`.
        metavar: what stands for its value in the help.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"text": text, **bounds, "flags": flags, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all options: values that do not fit their fields are refused when the object is made.

    @dataclass(frozen=True)
    class Training(Options):
        epochs: int = option(3, "Passes over the data.", least=1)
    """

    error: ClassVar[type[ShallowerError]] = MethodError

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ShallowerError: of the kind `error`; it names the field, its value and what is allowed.
        """
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            problem = problem_of(getattr(self, field.name), field, hints[field.name])
            if problem:
                raise self.error(f"{field.name}={getattr(self, field.name)!r}: {problem}")


def hints_of(kind: type) -> Mapping[str, Any]:
    """The types of the fields of a dataclass, by name."""
    return get_type_hints(kind)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, without None: `int | None` is (int,)."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(hint) if kind is not type(None))
    return (hint,)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, also of one that may be None; () for any other hint."""
    kinds = kinds_of(hint)
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return get_args(kinds[0])
    return ()


def problem_of(value: Any, field: dataclasses.Field[Any], hint: Any) -> str:
    """What is wrong with a value of a field, or ""."""
    if value is None and type(None) in get_args(hint):
        return ""
    choices = choices_of(hint)
    if choices:
        if value in choices:
            return ""
        return f"choose one of {', '.join(map(str, choices))}"
    kinds = kinds_of(hint)
    whole = int in kinds and float not in kinds
    # beside a number other kinds may be allowed, and only a number has bounds
    others = any(kind not in (int, float) for kind in kinds)
    if (not whole and float not in kinds) or (others and not isinstance(value, (int, float))):
        return ""
    if isinstance(value, str) and str in kinds:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and not isinstance(value, int)):
        if whole:
            return "a whole number"
        return "a number"
    if not math.isfinite(value):
        return "a finite number"
    for name, phrase, holds in _BOUNDS:
        bound = field.metadata.get(name)
        if bound is not None and not holds(value, bound):
            return f"{phrase} {bound:.10g}"
    return ""


_BOUNDS = (
    ("least", "at least", operator.ge),
    ("most", "at most", operator.le),
    ("above", "above", operator.gt),
    ("below", "below", operator.lt),
)
