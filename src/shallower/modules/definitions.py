"""Definitions of functions, read as source text and compiled again with some of their calls changed.

    source = definition_of(function.__code__)                       # a Refusal where what is on disk is not what runs
    code = code_with(function.__code__, (("x.view(9)", 0),))    # with changed(x.view, 9) in the place of x.view(9)

Nothing is executed for it.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import inspect
import operator
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from shallower.errors import Refusal

_ORIGINALS: WeakKeyDictionary[types.CodeType, types.CodeType] = WeakKeyDictionary()
"""Of what was compiled again, the code that is its own definition's."""

_FUTURE = 0
for _feature in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _feature).compiler_flag


@dataclass(frozen=True)
class Source:
    """The definition of a function.

    Attributes:
        tree: with the lines and columns of its file.
        calls: what can be changed in it, in order.
    """

    tree: ast.FunctionDef
    calls: tuple[WrittenCall, ...]


@dataclass(frozen=True)
class WrittenCall:
    """A call, a subscript, or an operation of two values, with its text and how many of the same text come before."""

    node: ast.Call | ast.Subscript | ast.BinOp | ast.AugAssign
    text: str
    ordinal: int

    @property
    def step(self) -> tuple[str, int]:
        """How it is named in a path."""
        return self.text, self.ordinal


@functools.lru_cache(maxsize=1024)
def definition_of(code: types.CodeType) -> Source | Refusal:
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
    source = Source(made, calls_in(made))
    if not is_private(source) and not _is_definition_of(made, _ORIGINALS.get(code, code)):
        return Refusal(f"the source of `{name}` is not what runs: its file has changed since it was imported")
    return source


_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_NO_STEPS = {"EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"}
_OF_METHODS = {"LOAD_METHOD": "LOAD_ATTR", "CALL_METHOD": "CALL_FUNCTION"}
"""Calls of what the file has imported are compiled as calls of attributes, those of others as calls of methods."""


def _is_definition_of(tree: ast.FunctionDef, code: types.CodeType) -> bool:
    """Whether a function was compiled from this definition, wherever that stands."""
    steps = _instructions_of(code)
    for imported in ((), code.co_names):
        found = _compiled(copy.deepcopy(tree), code, (), imported)
        if found is not None and _instructions_of(found) == steps:
            return True
    return False


def _instructions_of(code: types.CodeType) -> list[Any]:
    """What a function does, step by step."""
    kept: list[dis.Instruction] = []
    before: dict[int, int] = {}
    for instruction in dis.get_instructions(code):
        before[instruction.offset] = len(kept)
        if instruction.opname not in _NO_STEPS:
            kept.append(instruction)
    steps: list[Any] = [code.co_varnames, code.co_freevars, code.co_cellvars]
    for instruction in kept:
        given = instruction.argval
        if instruction.opcode in _JUMPS:
            given = before[given]
        elif isinstance(given, types.CodeType):
            given = _instructions_of(given)
        elif not isinstance(given, frozenset):
            given = repr(given)  # 1 is not 1.0
        steps.append((_OF_METHODS.get(instruction.opname, instruction.opname), given))
    return steps


def calls_in(tree: ast.FunctionDef) -> tuple[WrittenCall, ...]:
    """What can be changed in a definition, in order of where it ends."""
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Call, ast.Subscript, ast.BinOp, ast.AugAssign))]
    calls: list[WrittenCall] = []
    counts: Counter[str] = Counter()
    for node in sorted(found, key=end_of):
        text = ast.unparse(node)
        calls.append(WrittenCall(node, text, counts[text]))
        counts[text] += 1
    return tuple(calls)


def end_of(node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Line and column."""
    return node.end_lineno or 0, node.end_col_offset or 0


def is_private(source: Source) -> bool:
    """Whether it uses names that mean another one within their class."""
    for node in ast.walk(source.tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            return True
    return False


_FUNCTION = "_shallower_function"
_OPERATIONS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Pow: "pow",
}
GIVEN: dict[str, Any] = {"_shallower_slice": slice}
"""What a function that was compiled again is given by a name of its own."""

for _operation in ("getitem", "setitem", *_OPERATIONS.values(), *(f"i{name}" for name in _OPERATIONS.values())):
    GIVEN[f"_shallower_{_operation}"] = getattr(operator, _operation)


def identifiers() -> Iterator[str]:
    """The names of what stands for the calls of a function."""
    return (f"_shallower_{i}" for i in range(1 << 30))


@functools.lru_cache(maxsize=1024)
def code_with(code: types.CodeType, steps: tuple[tuple[str, int], ...]) -> types.CodeType | Refusal:
    """The code of a function with calls changed; not executed."""
    source = definition_of(code)
    if isinstance(source, Refusal):
        return source
    tree = copy.deepcopy(source.tree)
    nodes = {call.step: call.node for call in calls_in(tree)}
    names: dict[ast.AST, str] = {}
    for name, step in zip(identifiers(), steps, strict=False):
        if step not in nodes:
            return Refusal(f"`{code.co_name}` has no call `{step[0]}` number {step[1]}")
        names[nodes[step]] = name
    _Calls(names).visit(tree)
    found = _compiled(tree, code, [*names.values(), *GIVEN])
    if found is None:
        return Refusal(f"`{code.co_name}` cannot be compiled again")
    found = found.replace(co_name=code.co_name)
    _ORIGINALS[found] = _ORIGINALS.get(code, code)
    return found


def _compiled(
    tree: ast.FunctionDef, code: types.CodeType, more: Sequence[str], imported: Sequence[str] = ()
) -> types.CodeType | None:
    """The code of a definition, which is changed, in the place of `code` and with more names around it."""
    tree.decorator_list = []
    tree.name = _FUNCTION  # what it calls by its own name is not it
    own = [*code.co_freevars, *more]
    imports = [f"import {name}\n" for name in imported]
    around = ast.parse(f"{''.join(imports)}def around({', '.join(own)}):\n    pass")
    definition: Any = around.body[-1]
    definition.body = [tree]
    ast.fix_missing_locations(around)
    whole = compile(around, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    return _function_in(whole)


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
