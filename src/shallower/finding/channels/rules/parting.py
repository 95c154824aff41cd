"""Tensors side by side, and parts of tensors.

torch.cat([x, y], 1)        # the channels of x, then those of y
gate, up = z.chunk(2, -1)   # two halves that stay equal
x.narrow(1, 0, 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Layout, cat, close, fixed, is_open, parts_of, reason_of, split, tie
from shallower.finding.channels.rules.arguments import given, integer, tensor, values
from shallower.recording.tracing import Call

STACKED = "tensors are stacked along it"


@rule("cat concat concatenate")
def side_by_side(f: Following, call: Call) -> Axes:
    """Tensors one after the other along one axis; an empty vector is nothing."""
    columns: list[Axes] = []
    for value in values(call, 0, "tensors"):
        if value.elements or len(value.shape) > 1:
            columns.append(f.axes(value))
    if not columns:
        return [fixed(0, "nothing")]
    return _joined(columns, integer(call, 1, "dim", 0) % len(columns[0]))


@rule("hstack vstack dstack column_stack row_stack")
def beside(f: Following, call: Call) -> Axes:
    """Tensors one after the other along the first, the second or the third axis."""
    given_values = values(call, 0, "tensors")
    if call.name == "hstack" and len(given_values[0].shape) == 1:
        return _joined([f.axes(value) for value in given_values], 0)
    axis = {"hstack": 1, "vstack": 0, "row_stack": 0, "column_stack": 1, "dstack": 2}[call.name]
    if len(given_values[0].shape) <= max(axis, 1):
        raise UnknownUseError
    return _joined([f.axes(value) for value in given_values], axis)


def _joined(columns: list[Axes], axis: int) -> Axes:
    for axes in columns[1:]:
        for i, layout in enumerate(axes):
            if i != axis:
                tie(columns[0][i], layout)
    joined = list(columns[0])
    joined[axis] = cat([axes[axis] for axes in columns])
    return joined


@rule("stack")
def stacked(f: Following, call: Call) -> Axes:
    """Tensors along a new axis."""
    tensors = values(call, 0, "tensors")
    axes = f.tied(tensors)
    where = integer(call, 1, "dim", 0) % (len(axes) + 1)
    stack = f.turns.stacked(tensors) or fixed(len(tensors), STACKED)
    return [*axes[:where], stack, *axes[where:]]


@rule("chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split")
def divided(f: Following, call: Call) -> list[Axes]:
    """Parts of an axis; where they are as equal as they can be by definition, what goes in one goes in all."""
    axes = f.axes(tensor(call, 0, "input", "tensor", "self"))
    sizes_given = given(call, 1, "chunks", "split_size", "split_sizes", "split_size_or_sections", "indices_or_sections")
    dim = integer(call, 2, "dim", 0) % len(axes)
    sizes = [part.shape[dim] for part in call.outputs]
    if not isinstance(sizes_given, int):
        layouts = parts_of(axes[dim], sizes)
    else:
        layouts = _equal(axes[dim], sizes, f"{f.title(call)} divides it into parts that are not equal")
    return [_with(axes, dim, layout) for layout in layouts]


def stretch(layout: Layout, start: int, length: int) -> Layout:
    """Some positions of a layout side by side."""
    if not is_open(layout) or not length:
        return fixed(length, reason_of(layout))
    return parts_of(layout, [start, length, layout.size - start - length])[1]


def take_at(f: Following, call: Call, layout: Layout, index: Any) -> None:
    """A position by number: the first and the last are where they are, whatever else goes."""
    if isinstance(index, int) and f.turns.pick(call, layout, index):
        return
    if not isinstance(index, int) or index not in (0, -1) or layout.size < 2 or not is_open(layout):
        close(layout, f"{f.title(call)} takes positions of it by number")
    elif index == 0:
        split(layout, 1)
    else:
        split(layout, layout.size - 1)


def _equal(layout: Layout, sizes: Sequence[int], reason: str) -> list[Layout]:
    """Parts that stay as equal as they are: what goes in one goes in all, and what only some of them have stays."""
    parts, alike = parts_of(layout, sizes), list[Layout]()
    for part in parts:
        own, rest = parts_of(part, [min(sizes), part.size - min(sizes)])
        close(rest, reason)
        alike.append(own)
    for own in alike[1:]:
        tie(alike[0], own)
    return parts


def _with(axes: Axes, dim: int, layout: Layout) -> Axes:
    changed = list(axes)
    changed[dim] = layout
    return changed


@rule("unbind")
def unbound(f: Following, call: Call) -> list[Axes]:
    """One tensor for each position of an axis, which must stay as it is."""
    axes = f.axes(call.inputs[0])
    dim = integer(call, 1, "dim", 0) % len(axes)
    layout = axes.pop(dim)
    if is_open(layout):
        for i, value in enumerate(call.outputs):
            f.turns.of_value[value] = [(layout, i)]
        f.turns.picked.append((layout, call))
    return [list(axes) for _ in call.outputs]


@rule("select")
def selected(f: Following, call: Call) -> Axes:
    """One position of an axis."""
    axes = f.axes(call.inputs[0])
    dim = integer(call, 1, "dim") % len(axes)
    take_at(f, call, axes.pop(dim), given(call, 2, "index"))
    return axes


@rule("narrow")
def narrowed(f: Following, call: Call) -> Axes:
    """A stretch of an axis."""
    axes = f.axes(call.inputs[0])
    dim, start, length = integer(call, 1, "dim"), integer(call, 2, "start"), integer(call, 3, "length")
    return _with(axes, dim, stretch(axes[dim], start % max(axes[dim].size, 1), length))


@rule("diagonal")
def diagonal(f: Following, call: Call) -> Axes:
    """(..., n, n) -> (..., n)."""
    axes = f.axes(call.inputs[0])
    first, second = integer(call, 2, "dim1", 0), integer(call, 3, "dim2", 1)
    pair = axes[first], axes[second]
    rest = [axis for axis in axes if axis not in pair]
    if integer(call, 1, "offset", 0) == 0 and pair[0].size == pair[1].size:
        tie(*pair)
        return [*rest, pair[0]]
    for axis in pair:
        close(axis, f"{f.title(call)} takes places beside the diagonal")
    return [*rest, fixed(call.outputs[0].shape[-1], "a diagonal")]
