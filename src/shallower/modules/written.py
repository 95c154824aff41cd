"""Calls where they are written: found from the frames that run them, and made to take other numbers.

    path, before = path_along(way_to(frame, module))        # (("self.qkv(x).reshape(B, N, 3, 8, C // 8)", 0),), 1
    forward = renumbered(type(module).forward, {path: {5: 64}})

A forward is read as source text and compiled again with `changed(x.reshape, B, N, C)` in the place of
`x.reshape(B, N, C)`. Functions that it calls are compiled again in the same way, for this call of them only. Nothing
is executed for it, and closures, defaults and globals stay those of the original.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from shallower.errors import Refusal, SiteError

CallPath = tuple[tuple[str, int], ...]
"""As in `Written`."""

NumbersByCall = Mapping[CallPath, Mapping[int, float]]
"""For each call that is changed, place -> number, as in `Written`."""

_MOST_TEXT = 1000
_INSIDE_TORCH = {"torch.overrides", "torch._tensor", "torch.functional", "torch.nn.functional", "torch._jit_internal"}
_FUTURE = 0
for _feature in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _feature).compiler_flag


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call is given, in order: sequences by what is in them, a slice as its start, stop and step."""
    return [*_leaves((*args, *kwargs.values()))]


def _leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, slice):
        given = (given.start, given.stop, given.step)
    if not isinstance(given, (tuple, list)):
        yield given
        return
    for item in given:
        yield from _leaves(item)


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


@dataclass(frozen=True)
class _Source:
    """The definition of a function.

    Attributes:
        tree: with the lines and columns of its file.
        calls: what can be changed in it, in order.
    """

    tree: ast.FunctionDef
    calls: tuple[_Call, ...]


@dataclass(frozen=True)
class _Call:
    """A call, a subscript, or an operation of two values, with its text and how many of the same text come before."""

    node: ast.Call | ast.Subscript | ast.BinOp | ast.AugAssign
    text: str
    ordinal: int

    @property
    def step(self) -> tuple[str, int]:
        """How it is named in a path."""
        return self.text, self.ordinal


@functools.lru_cache(maxsize=1024)
def _source_of(code: types.CodeType) -> _Source | Refusal:
    """The definition that a code object was compiled from, or why there is none."""
    name = code.co_name
    try:
        lines, first = inspect.getsourcelines(code)
        text = "".join(lines)
        indented = lines[0][:1] in (" ", "\t")
        tree = ast.parse("if True:\n" + text if indented else text)
    except (OSError, TypeError, SyntaxError, IndexError):
        return Refusal(f"the source of `{name}` is not there")
    ast.increment_lineno(tree, first - 1 - indented)
    made: Any = tree.body[0]
    if isinstance(made, ast.If):
        made = made.body[0]
    if not isinstance(made, ast.FunctionDef) or made.name != name:
        return Refusal(f"`{name}` is no function with a definition of its own")
    return _Source(made, _calls_in(made))


def _calls_in(tree: ast.FunctionDef) -> tuple[_Call, ...]:
    """What can be changed in a definition, in order of where it ends."""
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Call, ast.Subscript, ast.BinOp, ast.AugAssign))]
    calls: list[_Call] = []
    counts: Counter[str] = Counter()
    for node in sorted(found, key=_end):
        text = ast.unparse(node)
        calls.append(_Call(node, text, counts[text]))
        counts[text] += 1
    return tuple(calls)


def _end(node: ast.expr | ast.stmt) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _is_private(source: _Source) -> bool:
    """Whether it uses names that mean another one within their class."""
    for node in ast.walk(source.tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            return True
    return False


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
        if not inside and name not in ("torch.nn.modules.module", __name__):
            found.append(Waypoint(frame.f_code, frame.f_lasti, frame.f_lineno, frame.f_globals))
        frame = frame.f_back
    if frame is None or frame.f_locals.get("self") is not module or _is_anothers(module):
        return ()
    return tuple(found[::-1])


@functools.lru_cache(maxsize=4096)
def _path_along(way: tuple[tuple[types.CodeType, int, int], ...]) -> tuple[CallPath, _Call] | Refusal:
    """The path, and the last call of it."""
    spots = list(way)
    steps: list[tuple[str, int]] = []
    call: _Call | None = None
    while spots:
        code, at, line = spots.pop(0)
        name, source = code.co_name, _source_of(code)
        if isinstance(source, Refusal):
            return source
        if _is_private(source):
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


def _call_at(source: _Source, code: types.CodeType, at: int, line: int) -> _Call | None:
    """The call that a function is at; where there are no columns, before Python 3.11, the only one of the line."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        inside = [call for call in source.calls if call.node.lineno <= line <= _end(call.node)[0]]
        return inside[0] if len(inside) == 1 else None
    first_line, last_line, column, last = [*positions()][at // 2]
    found: _Call | None = None
    for call in source.calls:
        node = call.node
        if _end(node) != (last_line, last):
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
        name: types.CellType(Changed(change)) for name, change in zip(_identifiers(), changes.values(), strict=False)
    }
    code = _new_code(function.__code__, tuple(changes))
    if isinstance(code, Refusal):
        return code
    cells |= dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for name, given in _GIVEN.items():
        cells[name] = types.CellType(given)
    closure = tuple(cells[name] for name in code.co_freevars)
    again = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(again, function)
    again.__kwdefaults__ = function.__kwdefaults__
    if "__wrapped__" not in vars(function):
        del vars(again)["__wrapped__"]
    return again


_FUNCTION = "_shallower_function"
_OPERATIONS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Pow: "pow",
}
_GIVEN: dict[str, Any] = {"_shallower_slice": slice}
"""What a function that was compiled again is given by a name of its own."""

for _operation in ("getitem", "setitem", *_OPERATIONS.values(), *(f"i{name}" for name in _OPERATIONS.values())):
    _GIVEN[f"_shallower_{_operation}"] = getattr(operator, _operation)


def _identifiers() -> Iterator[str]:
    """The names of what stands for the calls of a function."""
    return (f"_shallower_{i}" for i in range(1 << 30))


@functools.lru_cache(maxsize=1024)
def _new_code(code: types.CodeType, steps: tuple[tuple[str, int], ...]) -> types.CodeType | Refusal:
    """The code of a function with calls changed; not executed."""
    source = _source_of(code)
    if isinstance(source, Refusal):
        return source
    tree = copy.deepcopy(source.tree)
    nodes = {call.step: call.node for call in _calls_in(tree)}
    names: dict[ast.AST, str] = {}
    for name, step in zip(_identifiers(), steps, strict=False):
        if step not in nodes:
            return Refusal(f"`{code.co_name}` has no call `{step[0]}` number {step[1]}")
        names[nodes[step]] = name
    _Calls(names).visit(tree)
    tree.decorator_list = []
    tree.name = _FUNCTION  # what it calls by its own name is not it
    own = [*code.co_freevars, *names.values(), *_GIVEN]
    around = ast.parse(f"def around({', '.join(own)}):\n    pass")
    definition: Any = around.body[0]
    definition.body = [tree]
    ast.fix_missing_locations(around)
    whole = compile(around, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    found = _function_in(whole)
    if found is None:
        return Refusal(f"`{code.co_name}` cannot be compiled again")
    return found.replace(co_name=code.co_name)


def _function_in(code: types.CodeType) -> types.CodeType | None:
    """The function that was compiled again, within the code around it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found = constant if constant.co_name == _FUNCTION else _function_in(constant)
            if found is not None:
                return found
    return None


class _Calls(ast.NodeTransformer):
    """Puts the names that stand for calls in front of their callees."""

    def __init__(self, names: Mapping[ast.AST, str]) -> None:
        self.names = names

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """f(x) becomes changed(f, x)."""
        name = self.names.get(node)
        self.generic_visit(node)
        if name is None:
            return node
        return ast.copy_location(ast.Call(_identifier(name, node), [node.func, *node.args], node.keywords), node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        """x[i] becomes changed(getitem, x, i)."""
        name = self.names.get(node)
        self.generic_visit(node)
        if name is None or not isinstance(node.ctx, ast.Load):
            return node
        return _applied(name, "getitem", node, node.value, _index(node.slice))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """x * y becomes changed(mul, x, y)."""
        name = self.names.get(node)
        self.generic_visit(node)
        if name is None or type(node.op) not in _OPERATIONS:
            return node
        return _applied(name, _OPERATIONS[type(node.op)], node, node.left, node.right)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        """x *= y becomes x = changed(imul, x, y)."""
        name, target = self.names.get(node), node.target
        self.generic_visit(node)
        if name is None or not isinstance(target, ast.Name) or type(node.op) not in _OPERATIONS:
            return node
        made = _applied(name, f"i{_OPERATIONS[type(node.op)]}", node, _identifier(target.id, target), node.value)
        return ast.copy_location(ast.Assign([target], made), node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        """x[i] = y becomes changed(setitem, x, i, y)."""
        target = node.targets[0]
        name = self.names.get(target)
        self.generic_visit(node)
        if len(node.targets) > 1 or not isinstance(target, ast.Subscript) or name is None:
            return node
        made = _applied(name, "setitem", target, target.value, _index(target.slice), node.value)
        return ast.copy_location(ast.Expr(made), node)


def _applied(name: str, operation: str, node: ast.expr | ast.stmt, *given: ast.expr) -> ast.Call:
    """A changed operation on some values."""
    made = ast.Call(_identifier(name, node), [_identifier(f"_shallower_{operation}", node), *given], [])
    return ast.copy_location(made, node)


def _identifier(name: str, node: ast.expr | ast.stmt) -> ast.Name:
    return ast.copy_location(ast.Name(name, ast.Load()), node)


def _index(index: ast.expr) -> ast.expr:
    """What stands between brackets, as an argument."""
    if isinstance(index, ast.Tuple):
        return ast.copy_location(ast.Tuple([_index(item) for item in index.elts], ast.Load()), index)
    if isinstance(index, ast.Slice):
        parts = [part or ast.Constant(None) for part in (index.lower, index.upper, index.step)]
        return ast.copy_location(ast.Call(_identifier("_shallower_slice", index), parts, []), index)
    return index


# --------------------------------------------------------------------------------------------------- on a module

_NUMBERS = "_shallower_numbers"
_FORWARD = "_shallower_forward"


def numbers_written(owner: nn.Module) -> dict[CallPath, dict[int, float]]:
    """The numbers that calls in the forward of a module were given."""
    found: dict[CallPath, dict[int, float]] = vars(owner).get(_NUMBERS, {})
    return found


def base_forward(owner: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module with these numbers; None where it is that of its class."""
    found: Callable[..., Any] | None = vars(owner).get(_FORWARD)
    return found


def _is_anothers(owner: nn.Module) -> bool:
    """Whether somebody else has replaced the forward on the instance."""
    own = vars(owner).get("forward")
    return own is not None and getattr(own, "__func__", None) is not base_forward(owner)


def give_number(owner: nn.Module, path: CallPath, place: int, value: float) -> None:
    """Let a call in the forward of a module be given this number; `rewriting.bind` puts the new forward in place.

    Raises:
        SiteError: there is no such call, or the forward cannot be compiled again.
    """
    record = copy.deepcopy(numbers_written(owner))
    record.setdefault(path, {})[place] = value
    forward = renumbered(type(owner).forward, record)
    if isinstance(forward, Refusal):
        raise SiteError(f"{type(owner).__name__}: {forward}")
    vars(owner)[_NUMBERS] = record
    vars(owner)[_FORWARD] = forward
