"""Linear maps: one run of channels is added up, another begins."""

from __future__ import annotations

from typing import Any

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import Layout, close, divide, fixed, tie, within
from shallower.recording.tracing import Call, Value


@rule("linear", "input weight bias")
def linear(f: Following, call: Call, input: Value, weight: Value, bias: Value | None) -> Axes | None:
    """y = x W^T + b."""
    rows = f.axes(weight)
    if len(rows) != 2:
        return None
    *batch, features = f.axes(input)
    f.contract(call, features, rows[1])
    f.write(call, rows[0], bias)
    return [*batch, rows[0]]


@rule("conv1d conv2d conv3d", "input weight bias stride padding dilation groups")
def convolution(
    f: Following, call: Call, input: Value, weight: Value, bias: Value | None, _s: Any, _p: Any, _d: Any, groups: Any
) -> Axes:
    """Rows (out, in / groups, taps ...); an unbatched image has no axis in front of its channels."""
    rows, columns, *taps = f.axes(weight)
    axes = f.axes(input)
    count = groups if isinstance(groups, int) else 1
    channels = axes[-1 - len(taps)]
    _close_taps(taps)
    _grouped(f, call, channels, columns, rows, count)
    f.write(call, rows, bias)
    return [*axes[: -1 - len(taps)], rows, *_pixels(call, len(taps))]


@rule(
    "conv_transpose1d conv_transpose2d conv_transpose3d",
    "input weight bias stride padding output_padding groups dilation",
)
def transposed_convolution(
    f: Following, call: Call, input: Value, weight: Value, bias: Value | None, _s: Any, _p: Any, _o: Any, groups: Any
) -> Axes:
    """Rows (in, out / groups, taps ...)."""
    columns, each, *taps = f.axes(weight)
    axes = f.axes(input)
    count = groups if isinstance(groups, int) else 1
    _close_taps(taps)
    f.contract(call, axes[-1 - len(taps)], columns)
    made: Layout = each
    if count > 1:
        outer, _ = divide(columns, count, columns.size // count)
        made = within([outer, each])
    f.write(call, made, bias)
    return [*axes[: -1 - len(taps)], made, *_pixels(call, len(taps))]


def _close_taps(taps: Axes) -> None:
    for axis in taps:
        close(axis, "taps of a kernel")


def _pixels(call: Call, dims: int) -> Axes:
    sizes = call.outputs[0].shape
    return [fixed(size, "pixels") for size in sizes[len(sizes) - dims :]]


def _grouped(f: Following, call: Call, channels: Layout, columns: Layout, rows: Layout, groups: int) -> None:
    """Group i of the rows reads group i of the channels: groups go whole, or all lose the same channel."""
    if groups == 1:
        f.contract(call, channels, columns)
        return
    outer, each = divide(channels, groups, channels.size // groups)
    made, _ = divide(rows, groups, rows.size // groups)
    tie(outer, made)
    if each.size > 1:
        f.contract(call, each, columns)


@rule("matmul bmm mm mv dot inner", "input other")
def product(f: Following, call: Call, input: Value, other: Value) -> Axes | None:
    """Matrices, broadcast over the axes in front."""
    return _multiplied(f, call, f.axes(input), f.axes(other))


def _multiplied(f: Following, call: Call, left: Axes, right: Axes) -> Axes | None:
    if call.name == "rmatmul":
        left, right = right, left
    f.contract(call, left[-1], right[0 if len(right) == 1 else -2])
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else []
    batch = f.broadcast(left[:-2], right[:-2])
    for layout in (*rows, *columns):
        f.written.append((layout, call))
    return [*batch, *rows, *columns]


@rule("addmm baddbmm addbmm")
def added_product(f: Following, call: Call) -> Axes | None:
    """b + x W."""
    if len(call.inputs) != 3:
        return None
    input, first, second = call.inputs
    made = _multiplied(f, call, f.axes(first), f.axes(second))
    own = f.axes(input)
    if made is None or len(own) > len(made):
        return None
    for layout, bias in zip(reversed(made), reversed(own), strict=False):
        if bias.size > 1:
            tie(layout, bias)
    return made


@rule("outer ger", "input other")
def outer_product(f: Following, call: Call, input: Value, other: Value) -> Axes:
    """Every number by every other."""
    return [*f.axes(input), *f.axes(other)]


@rule("einsum")
def einsum(f: Following, call: Call) -> Axes | None:
    """Letters on both sides pass, the others are added up."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or not all(isinstance(value, Value) for value in operands):
        return None
    left, _, right = equation.replace(" ", "").partition("->")
    letters: dict[str, Layout] = {}
    seen: list[str] = []
    for term, value in zip(left.split(","), operands, strict=True):
        for letter, axis in zip(_spelled(term, len(value.shape)), f.axes(value), strict=True):
            seen.append(letter)
            if letter not in letters or letters[letter].size == 1:
                letters[letter] = axis
            elif axis.size > 1:
                tie(letters[letter], axis)
    if "->" not in equation:
        right = "".join(sorted(letter for letter in set(seen) if seen.count(letter) == 1 and not letter.isdigit()))
        right = "..." + right if "..." in left else right
    out = _spelled(right, len(call.outputs[0].shape))
    for letter, axis in letters.items():
        if letter not in out:
            f.contracted.append((axis, call))
        elif seen.count(letter) == 1:
            f.written.append((axis, call))
    return [letters[letter] for letter in out]


def _spelled(term: str, dims: int) -> list[str]:
    """One letter for each axis; those of "..." are numbered from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    count = dims - len(before) - len(after)
    return [*before, *(str(i) for i in range(count, 0, -1)), *after]


@rule("bilinear", "first second weight bias")
def bilinear(f: Following, call: Call, first: Value, second: Value, weight: Value, bias: Value | None) -> Axes:
    """y_o = x1^T W_o x2 + b_o."""
    rows, left, right = f.axes(weight)
    f.contract(call, f.axes(first)[-1], left)
    f.contract(call, f.axes(second)[-1], right)
    f.write(call, rows, bias)
    return [*f.axes(first)[:-1], rows]


@rule("embedding", "input weight")
def embedding(f: Following, call: Call, input: Value, weight: Value) -> Axes:
    """A row for each number."""
    rows, features = f.axes(weight)
    close(rows, f"{f.title(call)} picks its rows by number")
    f.written.append((features, call))
    return [*f.axes(input), features]


@rule("grouped_mm", "input weight offs bias")
def grouped_product(
    f: Following, call: Call, input: Value, weight: Value, _offs: Any, bias: Value | None
) -> Axes | None:
    """x (rows, in) by one of W (experts, in, out) for each stretch of rows."""
    rows, columns = f.axes(input), f.axes(weight)
    if len(rows) != 2 or len(columns) != 3:
        return None
    close(columns[0], "its experts are told apart by number")
    f.contract(call, rows[1], columns[1])
    f.write(call, columns[2], None)
    return [rows[0], columns[2]]
