"""Positions of an axis by slices, numbers and masks.

x[:, :, None, 1:]           # a slice cuts channels in two
table[index]                # rows of a table stay as they are, its columns pass
x.gather(1, index)
"""

from __future__ import annotations

from typing import Any

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.indices import close_positions, is_blank, named
from shallower.finding.channels.layout import ONE, Layout, close, divide, fixed, is_open, tie, within
from shallower.finding.channels.rules.arguments import given, integer, tensor
from shallower.finding.channels.rules.parting import stretch, take_at
from shallower.recording.tracing import Call, Value


def _picked(f: Following, call: Call) -> str:
    return f"{f.title(call)} picks positions by number"


TAKES = {"index_select", "gather", "take_along_dim"}
"""Functions that give the positions that they pick, one for each number."""


@rule("getitem")
def part(f: Following, call: Call) -> Axes:
    """x[...] with numbers, slices, None, Ellipsis, tensors and a mask."""
    axes, shape = f.axes(tensor(call, 0)), call.outputs[0].shape
    items = _items(call.args[1])
    masked = _has_mask(items, len(axes), len(shape))
    whole = masked and len(items) == 1 and items[0].shape == call.inputs[0].shape
    if whole and repeats_last(items[0]):
        return [_of_whole_rows(f, call, axes, items[0])]
    found, places = _walk(f, call, axes, items, masked)
    if not places:
        return found
    # what tensors pick stands where they stand, or in front where other axes stand between them
    where = places[0] if places[0] == places[-1] else 0
    count = len(shape) - len(found)
    picked = [fixed(size, _picked(f, call)) for size in shape[where : where + count]]
    return [*found[:where], *picked, *found[where:]]


def _of_whole_rows(f: Following, call: Call, axes: Axes, mask: Value) -> Layout:
    """What a mask picks that is the same for all channels of the last axis, one row after the other."""
    f.broadcast(axes, f.axes(mask))
    for axis in axes[:-1]:
        close(axis, f"{f.title(call)} takes positions of it by number")
    rows = call.outputs[0].elements // axes[-1].size
    return within([fixed(rows, _picked(f, call)), axes[-1]])


@rule("setitem")
def written_in(f: Following, call: Call) -> Axes:
    """x[...] = value."""
    axes, value = f.axes(tensor(call, 0)), given(call, 2)
    _write(f, call, axes, _items(call.args[1]), value if isinstance(value, Value) else None)
    return axes


@rule("index_put")
def put(f: Following, call: Call) -> Axes:
    """x[indices] = value."""
    axes, indices = f.axes(tensor(call, 0, "input", "self")), given(call, 1, "indices")
    _write(f, call, axes, list(indices), tensor(call, 2, "values"))
    return axes


def _write(f: Following, call: Call, axes: Axes, items: list[Any], value: Value | None) -> None:
    own: Axes = f.axes(value) if value is not None and value.elements > 1 else []
    if any(_is_tensor(item) for item in items):
        place = _after_tensors(f, call, axes, items)
        for axis in own[: len(own) - len(place)]:
            close(axis, _picked(f, call))
    else:
        place, _ = _walk(f, call, axes, items, masked=False)
    for axis, other in zip(reversed(place), reversed(own), strict=False):
        if other.size > 1:
            tie(axis, other)


def _after_tensors(f: Following, call: Call, axes: Axes, items: list[Any]) -> Axes:
    """The axes that pass where tensors name the first ones; of a tensor of several axes it is not known how many."""
    while items[-1] is Ellipsis or items[-1] == slice(None):
        items = items[:-1]
    if not all(isinstance(item, Value) and item.shape for item in items):
        raise UnknownUseError(f"{f.title(call)} writes at places that it is not followed to")
    count = len(items) if len(items) > 1 else len(items[0].shape)
    for item in items:
        f.close_axes(item, _picked(f, call))
    for axis in axes[:count]:
        close(axis, f"{f.title(call)} writes at positions of it by number")
    return axes[count:]


def _items(index: Any) -> list[Any]:
    items = list(index) if isinstance(index, tuple) else [index]
    for item in items:
        if isinstance(item, (bool, str, tuple)):
            raise UnknownUseError
    return items


def _is_tensor(item: Any) -> bool:
    return (isinstance(item, list) and not _is_stretch(item)) or (isinstance(item, Value) and bool(item.shape))


def _is_stretch(item: Any) -> bool:
    """Whether it is a list of numbers that follow each other, like a slice."""
    if not isinstance(item, list) or not item or type(item[0]) is not int:
        return False
    return item == list(range(item[0], item[0] + len(item)))


def _has_mask(items: list[Any], dims: int, made: int) -> bool:
    """Whether the one tensor of an index is a mask, as the number of axes of the result shows."""
    shapes = [item.shape for item in items if isinstance(item, Value) and item.shape]
    if len(shapes) != 1 or len(shapes[0]) == 1:
        return False
    numbers = [item for item in items if isinstance(item, int) or (isinstance(item, Value) and not item.shape)]
    new = [item for item in items if item is None]
    return made == dims + len(new) - len(numbers) - len(shapes[0]) + 1


def _width(item: Any, masked: bool) -> int:
    """How many axes an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return len(item.shape) if masked and _is_tensor(item) else 1


def _walk(f: Following, call: Call, axes: Axes, items: list[Any], masked: bool) -> tuple[Axes, list[int]]:
    """What an index leaves of the axes, and where in it tensors pick."""
    found: Axes = []
    places: list[int] = []
    left = list(axes)
    rest = len(axes) - sum(_width(item, masked) for item in items)
    for item in [*items, Ellipsis]:
        count = rest if item is Ellipsis else _width(item, masked)
        own, left = left[:count], left[count:]
        if item is Ellipsis:
            found += own
            rest = 0
        elif _is_tensor(item):
            places.append(len(found))
            _close_picked(f, call, own, item)
        else:
            found += _taken(f, call, own, item)
    return found, places


def _close_picked(f: Following, call: Call, own: Axes, item: Any) -> None:
    if not (len(own) == 1 and isinstance(item, Value) and named(f, own[0], item)):
        for axis in own:
            close(axis, f"{f.title(call)} takes positions of it by number")
    if isinstance(item, Value):
        close_positions(f, item)


def _taken(f: Following, call: Call, own: Axes, item: Any) -> Axes:
    """What one item of an index leaves of the axis that it takes."""
    if item is None:
        return [fixed(1, ONE)]
    if isinstance(item, slice):
        return [_sliced(f, call, own[0], item)]
    if isinstance(item, list):
        part = stretch(own[0], item[0] % own[0].size, len(item))
        close(part, f"{f.title(call)} takes positions of it by number")
        return [part]
    take_at(f, call, own[0], item)
    return []


def _sliced(f: Following, call: Call, layout: Layout, which: slice) -> Layout:
    for bound in (which.start, which.stop, which.step):
        if isinstance(bound, Value):
            raise UnknownUseError(f"{f.title(call)} takes a part that depends on numbers")
    start, stop, step = which.indices(layout.size)
    count = len(range(start, stop, step))
    if step == 1 and count == layout.size:
        return layout
    if step == 1 or not is_open(layout):
        return stretch(layout, start, count)
    if layout.size % step or start >= step or count != layout.size // step:
        close(layout, f"{f.title(call)} takes every {step}th of its channels")
        return fixed(count, "a part of channels")
    each, steps = divide(layout, count, step)
    close(steps, f"{f.title(call)} takes every {step}th of its channels")
    return each


# ------------------------------------------------------------------------------------------------- by name


@rule(
    """
    index_select gather take_along_dim index_add scatter scatter_add scatter_reduce index_copy index_fill
    """
)
def by_number(f: Following, call: Call) -> Axes:
    """Positions of one axis by number: it must stay as it is; the others go with those of all tensors."""
    axes, shape = f.axes(tensor(call, 0, "input", "self")), call.outputs[0].shape
    dim = _dimension(call) % len(axes)
    for value in call.inputs[1:]:
        own = f.axes(value)
        if len(own) != len(axes):
            close_positions(f, value)
            continue
        close(own[dim], _picked(f, call))
        for i, axis in enumerate(own):
            if i != dim:
                _together(f, call, axes[i], axis)
    index = next((value for value in call.inputs[1:] if value in f.numbers), None)
    if index is None or not named(f, axes[dim], index):
        close(axes[dim], f"{f.title(call)} takes positions of it by number")
    elif call.name in ("scatter", "scatter_add", "index_add") and is_blank(f, call.inputs[0]):
        f.unchosen[call.outputs[0]] = axes[dim]
    for i, size in enumerate(shape):
        if axes[i].size != size or (i == dim and call.name in TAKES):
            axes[i] = fixed(size, _picked(f, call))
    return axes


def _dimension(call: Call) -> int:
    if call.name == "take_along_dim":
        return integer(call, 2, "dim")
    return integer(call, 1, "dim")


def _together(f: Following, call: Call, first: Layout, second: Layout) -> None:
    if first.size == second.size:
        tie(first, second)
    else:
        close(first, f"{f.title(call)} takes a part of it")
        close(second, f"{f.title(call)} takes a part of it")


@rule("masked_scatter")
def masked_scatter(f: Following, call: Call) -> Axes:
    """x[mask] = source in order: channels pass where the mask is the same for all of them."""
    values, mask, source = tensor(call, 0, "input"), tensor(call, 1, "mask"), tensor(call, 2, "source")
    axes, own = f.axes(values), f.axes(source)
    f.broadcast(axes, f.axes(mask))
    if repeats_last(mask) and own[-1].size == axes[-1].size:
        tie(axes[-1], own[-1])
        axes_in_order, own = axes[:-1], own[:-1]
    else:
        axes_in_order = axes
    for axis in (*axes_in_order, *own):
        close(axis, f"{f.title(call)} fills its positions in order")
    return f.axes(values)


def repeats_last(value: Value) -> bool:
    """Whether a tensor has equal numbers along its last axis, one that is or will be expanded."""
    if value.shape[-1:] == (1,):
        return True
    while value.call is not None and value.call.inputs:
        source = value.call.inputs[0]
        if value.call.name in ("expand", "expand_as", "broadcast_to"):
            return bool(source.shape) and source.shape[-1] == 1
        if source.shape != value.shape:
            return False
        value = source
    return False
