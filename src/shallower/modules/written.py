"""Calls where they are written: found from the frames that run them, and made to take other numbers.

    path, before = path_along(way_to(frame, module))        # (("self.qkv(x).reshape(B, N, 3, 8, C // 8)", 0),), 1
    forward = renumbered(type(module).forward, {path: {5: 64}})

A forward is read as source text and compiled again with `changed(x.reshape, B, N, C)` in the place of
`x.reshape(B, N, C)`. Functions that it calls are compiled again in the same way, for this call of them only. Nothing
is executed for it, and closures, defaults and globals stay those of the original.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from shallower.errors import Refusal, SiteError
from shallower.modules.definitions import (
    GIVEN,
    Source,
    WrittenCall,
    code_with,
    definition_of,
    end_of,
    identifiers,
    is_private,
)
from shallower.modules.forwards import Forward, has_foreign_forward

CallPath = tuple[tuple[str, int], ...]
"""As in `Written`."""

NumbersByCall = Mapping[CallPath, Mapping[int, float]]
"""For each call that is changed, place -> number, as in `Written`."""

_MOST_TEXT = 1000
_BETWEEN = {"torch.nn.modules.module", Forward.__module__, __name__}
"""Where functions call forwards, and functions that were compiled again."""

_INSIDE_TORCH = {"torch.overrides", "torch._tensor", "torch.functional", "torch.nn.functional", "torch._jit_internal"}


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call is given, in order: sequences by what is in them, a slice as its start, stop and step."""
    found: list[Any] = []
    _collect((*args, *kwargs.values()), found)
    return found


def _collect(given: Sequence[Any], found: list[Any]) -> None:
    for item in given:
        if isinstance(item, (tuple, list)):
            _collect(item, found)
        elif isinstance(item, slice):
            _collect((item.start, item.stop, item.step), found)
        else:
            found.append(item)


def with_leaves(
    args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Mapping[int, float]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with other numbers at some places; places below 0 are counted from the end."""
    if min(numbers, default=0) < 0:
        count = len(leaves(args, kwargs))
        numbers = {place % count: number for place, number in numbers.items()}
    counter = iter(range(1 << 30))
    given = _rebuilt([*args], numbers, counter)
    named = _rebuilt([*kwargs.values()], numbers, counter)
    return given, dict(zip(kwargs, named, strict=True))


def _rebuilt(given: Any, numbers: Mapping[int, float], counter: Iterator[int]) -> Any:
    if isinstance(given, slice):
        return slice(*_rebuilt([given.start, given.stop, given.step], numbers, counter))
    if not isinstance(given, (tuple, list)):
        return numbers.get(next(counter), given)
    items = []
    for item in given:
        items.append(_rebuilt(item, numbers, counter))
    return items if isinstance(given, list) else tuple(items)


class Waypoint(NamedTuple):
    """Where a function is, on the way from the forward of a module to a call."""

    code: types.CodeType
    at: int
    line: int
    known: Mapping[str, Any]


def way_to(frame: types.FrameType | None, module: nn.Module) -> tuple[Waypoint, ...]:
    """Where the functions are between a module's being called and the call that runs now, the forward first.

    Args:
        frame: innermost, that of the call or one that it has called.
        module: whose forward it is; () where that does not come to the call.
    """
    found: list[Waypoint] = []
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        name = frame.f_globals.get("__name__")
        inside = name in _INSIDE_TORCH and not found
        if not inside and name not in _BETWEEN:
            found.append(Waypoint(frame.f_code, frame.f_lasti, frame.f_lineno, frame.f_globals))
        frame = frame.f_back
    if frame is None or frame.f_locals.get("self") is not module or has_foreign_forward(module):
        return ()
    return tuple(found[::-1])


@functools.lru_cache(maxsize=4096)
def _path_along(way: tuple[tuple[types.CodeType, int, int], ...]) -> tuple[CallPath, WrittenCall] | Refusal:
    """The path, and the last call of it."""
    spots = list(way)
    steps: list[tuple[str, int]] = []
    call: WrittenCall | None = None
    while spots:
        code, at, line = spots.pop(0)
        name, source = code.co_name, definition_of(code)
        if isinstance(source, Refusal):
            return source
        if is_private(source):
            return Refusal(f"`{name}` uses private names")
        while spots and _lies_in(spots[0][0], code):
            code, at, line = spots.pop(0)
        call = _call_at(source, code, at, line)
        if call is None or len(call.text) > _MOST_TEXT:
            return Refusal(f"line {line} of `{name}` writes no call that can be named")
        steps.append(call.step)
    if call is None:
        return Refusal("the forward does not make the call, or has been replaced on the instance")
    return tuple(steps), call


def path_along(way: Sequence[Waypoint]) -> tuple[CallPath, int] | Refusal:
    """How a forward comes to a call, and how many tensors that is given before what is written, or why it has no path.

    Args:
        way: of the call.
    """
    found = _path_along(tuple(spot[:3] for spot in way))
    if isinstance(found, Refusal):
        return found
    path, call = found
    return path, int(_is_method(call.node, way[-1].known))


def _is_method(node: ast.expr | ast.stmt, known: Mapping[str, Any]) -> bool:
    """Whether what is called belongs to a tensor, which comes before what stands between the parentheses."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    base: ast.expr = node.func
    while isinstance(base, ast.Attribute):
        base = base.value
    name = base.id if isinstance(base, ast.Name) else ""
    return not isinstance(known.get(name), types.ModuleType)


def _lies_in(inner: types.CodeType, outer: types.CodeType) -> bool:
    """Whether a function is written within another."""
    for constant in outer.co_consts:
        if isinstance(constant, types.CodeType) and (constant is inner or _lies_in(inner, constant)):
            return True
    return False


def _call_at(source: Source, code: types.CodeType, at: int, line: int) -> WrittenCall | None:
    """The call that a function is at; where there are no columns, before Python 3.11, the only one of the line."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        inside = [call for call in source.calls if call.node.lineno <= line <= end_of(call.node)[0]]
        return inside[0] if len(inside) == 1 else None
    first_line, last_line, column, last = [*positions()][at // 2]
    found: WrittenCall | None = None
    for call in source.calls:
        node = call.node
        if end_of(node) != (last_line, last):
            continue
        # x * f(y) ends where f(y) does, and the start of a long chain is not that of its last call
        if (node.lineno, node.col_offset) == (first_line, column):
            return call
        if isinstance(node, (ast.Call, ast.Subscript)):
            found = call
    return found


# --------------------------------------------------------------------------------------------------- compiled again


@dataclass
class _Rewrite:
    """What becomes of one call: numbers of its own, and changes in the function that it calls."""

    numbers: dict[int, float] = field(default_factory=dict)
    inner: dict[tuple[str, int], _Rewrite] = field(default_factory=dict)


class Changed:
    """Stands in front of a callee in a function that was compiled again."""

    def __init__(self, change: _Rewrite) -> None:
        self.numbers = change.numbers
        self.inner = change.inner
        self._known: dict[Any, Any] = {}

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function with other numbers, or one that was compiled again in its place."""
        if self.inner:
            function = self._again(function)
        if self.numbers:
            given, kwargs = with_leaves(args, kwargs, self.numbers)
            return function(*given, **kwargs)
        return function(*args, **kwargs)

    def _again(self, function: Any) -> Any:
        if isinstance(function, types.MethodType):
            return types.MethodType(self._again(function.__func__), function.__self__)
        if isinstance(function, functools.partial):
            return functools.partial(self._again(function.func), *function.args, **function.keywords)
        if not isinstance(function, types.FunctionType):
            return function
        if function not in self._known:
            again = compiled_again(function, self.inner)
            # another function than when the number was found, for instance another implementation of attention
            self._known[function] = function if isinstance(again, Refusal) else again
        return self._known[function]


def renumbered(function: Any, numbers: NumbersByCall) -> Callable[..., Any] | Refusal:
    """A forward in which some calls are given other numbers, or why there cannot be one."""
    changes: dict[tuple[str, int], _Rewrite] = {}
    for path, own in numbers.items():
        inside = changes
        for step in path:
            change = inside.setdefault(step, _Rewrite())
            inside = change.inner
        change.numbers.update(own)
    if not isinstance(function, types.FunctionType):
        return Refusal("its forward is no function")
    return compiled_again(function, changes)


def compiled_again(
    function: types.FunctionType, changes: Mapping[tuple[str, int], _Rewrite]
) -> Callable[..., Any] | Refusal:
    """A function with some of its calls changed, or why there is none."""
    cells = {
        name: types.CellType(Changed(change)) for name, change in zip(identifiers(), changes.values(), strict=False)
    }
    code = code_with(function.__code__, tuple(changes))
    if isinstance(code, Refusal):
        return code
    for step, change in changes.items():
        if change.numbers and not _is_of_torch(step, function):
            return Refusal(f"`{step[0]}` is no call of PyTorch, and is given no other number")
    cells |= dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for name, given in GIVEN.items():
        cells[name] = types.CellType(given)
    closure = tuple(cells[name] for name in code.co_freevars)
    again = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(again, function)
    again.__kwdefaults__ = function.__kwdefaults__
    if "__wrapped__" not in vars(function):
        del vars(again)["__wrapped__"]
    return again


def _own_names(code: types.CodeType) -> set[str]:
    """The variables of a function and of those written within it."""
    found = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _own_names(constant)
    return found


def _is_of_torch(step: tuple[str, int], function: types.FunctionType) -> bool:
    """Whether a call may be one of PyTorch's: of a tensor, or of a function that is certainly from there."""
    name = _first_name(step[0])
    if name is None or name in _own_names(function.__code__):
        return True
    known = function.__globals__.get(name)
    home = known.__name__ if isinstance(known, types.ModuleType) else getattr(known, "__module__", None)
    return str(home).partition(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def _first_name(text: str) -> str | None:
    """The variable with which what is called begins, "F" of `F.relu(x)`; None where it is another expression."""
    statement = ast.parse(text).body[0]
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return None
    callee: ast.expr = statement.value
    while isinstance(callee, (ast.Call, ast.Attribute, ast.Subscript)):
        callee = callee.func if isinstance(callee, ast.Call) else callee.value
    return callee.id if isinstance(callee, ast.Name) else None


# --------------------------------------------------------------------------------------------------- on a module

_NUMBERS = "_shallower_numbers"


def numbers_written(owner: nn.Module) -> dict[CallPath, dict[int, float]]:
    """The numbers that calls in the forward of a module were given."""
    found: dict[CallPath, dict[int, float]] = vars(owner).get(_NUMBERS, {})
    return found


def base_forward(owner: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module with these numbers; None where it is that of its class.

    Raises:
        SiteError: there is no such call, or the forward cannot be compiled again.
    """
    numbers = numbers_written(owner)
    if not numbers:
        return None
    forward = renumbered(type(owner).forward, numbers)
    if isinstance(forward, Refusal):
        raise SiteError(f"{type(owner).__name__}: {forward}")
    return forward


def give_number(owner: nn.Module, path: CallPath, place: int, value: float) -> None:
    """Let a call in the forward of a module be given this number; `rewriting.bind` puts the new forward in place.

    Raises:
        SiteError: there is no such call, or the forward cannot be compiled again.
    """
    before = numbers_written(owner)
    record = copy.deepcopy(before)
    record.setdefault(path, {})[place] = value
    vars(owner)[_NUMBERS] = record
    try:
        base_forward(owner)
    except SiteError:
        vars(owner)[_NUMBERS] = before
        raise
