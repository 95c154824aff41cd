"""Operations that only move elements: reshapes, permutations, parts, and tensors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import (
    ONE,
    Layout,
    Run,
    cat,
    close,
    divide,
    fixed,
    is_open,
    parts_of,
    reshaped,
    tie,
    within,
)
from shallower.recording.tracing import Call, Value


def integers(values: Sequence[Any]) -> list[int]:
    """Dimensions or sizes, given one by one or as one sequence."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    return [value for value in values if isinstance(value, int)]


def moved_by(call: Call, *names: str) -> list[int]:
    """The whole numbers among a call's arguments behind the tensor."""
    return integers([*call.args[1:], *(call.kwargs[name] for name in names if name in call.kwargs)])


@rule("view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d")
def another_shape(f: Following, call: Call) -> Axes | None:
    """The same elements in another shape."""
    source, result = call.inputs[0], call.outputs[0]
    return reshaped(f.axes(source), result.shape) if source.elements == result.elements else None


@rule("permute")
def permuted(f: Following, call: Call) -> Axes:
    """Axes in another order."""
    axes = f.axes(call.inputs[0])
    return [axes[dim] for dim in moved_by(call, "dims")]


@rule("transpose swapaxes swapdims t get.T get.mT get.H adjoint")
def transposed(f: Following, call: Call) -> Axes:
    """Two axes change places."""
    axes = f.axes(call.inputs[0])
    first, second = moved_by(call, "dim0", "dim1", "axis0", "axis1") or (-2, -1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("movedim moveaxis", "input source destination")
def carried(f: Following, call: Call, input: Value, source: Any, destination: Any) -> Axes:
    """Axes go to other places, the rest closes up."""
    axes = f.axes(input)
    count = len(axes)
    origin = [dim % count for dim in integers([source])]
    goal = [dim % count for dim in integers([destination])]
    rest = iter([axes[i] for i in range(count) if i not in origin])
    placed = dict(zip(goal, origin, strict=True))
    return [axes[placed[i]] if i in placed else next(rest) for i in range(count)]


# ------------------------------------------------------------------------------------------------- side by side


@rule("cat concat concatenate hstack vstack", "tensors dim")
def side_by_side(f: Following, call: Call, tensors: Sequence[Value], dim: int | None) -> Axes:
    """Tensors one after the other along one axis."""
    given = [value for value in tensors if value.elements or len(value.shape) > 1]
    columns = [f.axes(value) for value in given]
    axis = {"hstack": 1, "vstack": 0}.get(call.name, dim or 0) % len(columns[0])
    for axes in columns[1:]:
        for i, layout in enumerate(axes):
            if i != axis:
                tie(columns[0][i], layout)
    joined = list(columns[0])
    joined[axis] = cat([axes[axis] for axes in columns])
    return joined


@rule("stack", "tensors dim")
def stacked(f: Following, call: Call, tensors: Sequence[Value], dim: int | None) -> Axes:
    """Tensors along a new axis."""
    axes = f.tied(tensors, tensors[0].shape)
    where = (dim or 0) % (len(axes) + 1)
    return [*axes[:where], fixed(len(tensors), "tensors are stacked along it"), *axes[where:]]


@rule("chunk unsafe_chunk", "input chunks dim")
def chunked(f: Following, call: Call, input: Value, chunks: int, dim: int | None) -> list[Axes]:
    """Equal parts: what goes in one goes in all, so that they stay equal."""
    return _parts(f, call, dim or 0)


@rule("split unsafe_split split_with_sizes tensor_split", "input sizes dim")
def divided(f: Following, call: Call, input: Value, sizes: Any, dim: int | None) -> list[Axes]:
    """Parts of given sizes."""
    return _parts(f, call, dim or 0)


def _parts(f: Following, call: Call, dim: int) -> list[Axes]:
    axes = f.axes(call.inputs[0])
    sizes = [part.shape[dim] for part in call.outputs]
    if len(set(sizes)) == 1:
        _, each = divide(axes[dim], len(sizes), sizes[0])
        layouts = [each] * len(sizes)
    else:
        layouts = parts_of(axes[dim], sizes)
    return [_with(axes, dim, layout) for layout in layouts]


def _with(axes: Axes, dim: int, layout: Layout) -> Axes:
    changed = list(axes)
    changed[dim] = layout
    return changed


@rule("unbind", "input dim")
def unbound(f: Following, call: Call, input: Value, dim: int | None) -> list[Axes]:
    """One tensor for each position of an axis, which must stay as it is."""
    axes = f.axes(input)
    where = (dim or 0) % len(axes)
    close(axes[where], f"{f.title(call)} gives one tensor for each of its channels")
    return [[*axes[:where], *axes[where + 1 :]] for _ in call.outputs]


@rule("select", "input dim index")
def selected(f: Following, call: Call, input: Value, dim: int, index: int) -> Axes:
    """One position of an axis."""
    axes = f.axes(input)
    return _at_index(f, call, axes, dim % len(axes))


@rule("narrow", "input dim start length")
def narrowed(f: Following, call: Call, input: Value, dim: int, start: Any, length: int) -> Axes | None:
    """A stretch of an axis."""
    axes = f.axes(input)
    if not isinstance(start, int):
        return None
    return _with(axes, dim, _stretch(f, call, axes[dim], slice(start, start + length)))


@rule("getitem", "input index")
def part(f: Following, call: Call, input: Value, index: Any) -> Axes | None:
    """x[...] with numbers, slices, None, Ellipsis and tensors."""
    return _indexed(f, call, f.axes(input), index, call.outputs[0].shape)


@rule("setitem", "input index value")
def written_in(f: Following, call: Call, input: Value, index: Any, value: Any) -> Axes | None:
    """x[...] = value."""
    axes = f.axes(input)
    if isinstance(value, Value):
        place = _indexed(f, call, axes, index, None)
        own = f.axes(value)
        if place is None or len(own) > len(place):
            return None
        for layout, other in zip(reversed(place), reversed(own), strict=False):
            if other.size > 1:
                tie(layout, other)
    return axes


def _indexed(f: Following, call: Call, axes: Axes, index: Any, shape: tuple[int, ...] | None) -> Axes | None:
    items = list(index) if isinstance(index, tuple) else [index]
    used = 0
    for item in items:
        if isinstance(item, Value) and shape is None:
            return None  # which positions a tensor names is not looked at
        used += 0 if item is None or item is Ellipsis or isinstance(item, bool) else 1
    if Ellipsis not in [item for item in items if not isinstance(item, Value)]:
        items.append(Ellipsis)
    found: Axes = []
    places: list[int] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            rest = len(axes) - used
            found += axes[dim : dim + rest]
            dim += rest
        elif item is None:
            found.append(fixed(1, ONE))
        elif isinstance(item, slice):
            if any(isinstance(bound, Value) for bound in (item.start, item.stop, item.step)):
                close(axes[dim], f"{f.title(call)} takes a part of it that depends on numbers")
                found.append(fixed(_length(shape, len(found)), "a part that depends on numbers"))
            else:
                found.append(_stretch(f, call, axes[dim], item))
            dim += 1
        elif isinstance(item, int):
            _at_index(f, call, axes, dim)
            dim += 1
        elif isinstance(item, Value) and len(item.shape) == 0 and item.elements == 1:
            close(axes[dim], f"{f.title(call)} takes positions of it by number")
            dim += 1
        else:
            close(axes[dim], f"{f.title(call)} takes positions of it by number")
            places.append(len(found))
            dim += 1
    if not places or shape is None:
        return found if not places else None
    # what tensors pick stands where they stand side by side, else in front
    count = len(shape) - len(found)
    where = places[0] if places[-1] == places[0] else 0
    picked = [fixed(size, "it is picked by number") for size in shape[where : where + count]]
    return [*found[:where], *picked, *found[where:]]


def _length(shape: tuple[int, ...] | None, dim: int) -> int:
    return shape[dim] if shape is not None else 1


def _at_index(f: Following, call: Call, axes: Axes, dim: int) -> Axes:
    if is_open(axes[dim]):
        close(axes[dim], f"{f.title(call)} takes one of its channels by number")
    return [*axes[:dim], *axes[dim + 1 :]]


def _stretch(f: Following, call: Call, layout: Layout, which: slice) -> Layout:
    start, stop, step = which.indices(layout.size)
    count = len(range(start, stop, step))
    if count == layout.size and step == 1:
        return layout
    if not is_open(layout) or count == 0:
        return fixed(count, "a part of positions")
    if step == 1:
        sizes = [size for size in (start, count, layout.size - start - count) if size]
        if len(set(sizes)) == 1 and len(sizes) > 1:
            return divide(layout, len(sizes), count)[1]
        return parts_of(layout, sizes)[1 if start else 0]
    if step > 0 and layout.size % step == 0 and count == layout.size // step:
        return divide(layout, count, step)[0]
    close(layout, f"{f.title(call)} takes every {step}th of its channels")
    return fixed(count, "a part of channels")


@rule("index_select gather take_along_dim index_add scatter scatter_add index_copy index_fill", "input dim index")
def by_number(f: Following, call: Call, input: Value, dim: Any, index: Any) -> Axes | None:
    """Positions of one axis by number: it must stay as it is; the others pass."""
    axes = f.axes(input)
    if not isinstance(dim, int) or len(call.outputs[0].shape) != len(axes):
        return None
    close(axes[dim], f"{f.title(call)} takes positions of it by number")
    sizes = call.outputs[0].shape
    for value in call.inputs[1:]:
        own = f.axes(value)
        if len(own) == len(axes):
            for i, layout in enumerate(own):
                if i != dim % len(axes) and layout.size == axes[i].size:
                    tie(axes[i], layout)
    found = _with(axes, dim, fixed(sizes[dim], "it is picked by number"))
    for i, size in enumerate(sizes):
        if found[i].size != size:
            close(found[i], f"{f.title(call)} takes a part of it")
            found[i] = fixed(size, "a part of positions")
    return found


# ------------------------------------------------------------------------------------------------- repetition


@rule("expand expand_as broadcast_to")
def expanded(f: Following, call: Call) -> Axes:
    """Axes of one position are repeated."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    found: Axes = [fixed(size, "it repeats one position") for size in shape]
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        if axis.size > 1 or shape[i] == 1:
            found[i] = axis
    return found


@rule("repeat tile")
def repeated(f: Following, call: Call) -> Axes:
    """The whole tensor several times along an axis."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    found: Axes = [fixed(size, "it repeats one position") for size in shape]
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        if shape[i]:
            found[i] = within([fixed(shape[i] // axis.size, "repetitions"), axis])
    return found


@rule("repeat_interleave", "input repeats dim")
def interleaved(f: Following, call: Call, input: Value, repeats: Any, dim: Any) -> Axes | None:
    """Each position several times, side by side."""
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    axes = f.axes(input)
    return _with(axes, dim, within([axes[dim], fixed(repeats, "repetitions")]))


@rule("flip fliplr flipud roll rot90")
def turned(f: Following, call: Call) -> Axes:
    """Positions of some axes change places: those stay as they are, the others pass."""
    axes = f.axes(call.inputs[0])
    dims = moved_by(call, "dims")
    if call.name == "roll":
        given = call.args[2] if len(call.args) > 2 else call.kwargs.get("dims", ())
        dims = integers([given])
    for dim in dims or range(len(axes)):
        close(axes[dim], f"{f.title(call)} moves its positions")
    return axes


# ------------------------------------------------------------------------------------------------- images


@rule("pad", "input pad mode value")
def padded(f: Following, call: Call, input: Value, pad: Any, mode: Any, value: Any) -> Axes | None:
    """Numbers around some axes; around channels they are channels of their own."""
    if not isinstance(pad, (tuple, list)) or not all(isinstance(size, int) for size in pad):
        return None
    axes = f.axes(input)
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        axis = len(axes) - 1 - i
        if (before, after) == (0, 0):
            continue
        plain = mode in (None, "constant") and not value
        if not is_open(axes[axis]) or not plain or min(before, after) < 0:
            close(axes[axis], f"{f.title(call)} repeats or cuts its edge")
            axes[axis] = fixed(axes[axis].size + before + after, "positions with an edge")
            continue
        around = [Run(size) for size in (before, after)]
        axes[axis] = cat([around[0], axes[axis], around[1]]) if before else cat([axes[axis], around[1]])
    return axes


@rule("pixel_shuffle", "input upscale_factor")
def pixels_from_channels(f: Following, call: Call, input: Value, upscale_factor: int) -> Axes:
    """(C r r, H, W) -> (C, H r, W r)."""
    *batch, channels, height, width = f.axes(input)
    r = upscale_factor
    kept, _ = divide(channels, channels.size // (r * r), r * r)
    reason = "pixels made of channels"
    return [*batch, kept, fixed(height.size * r, reason), fixed(width.size * r, reason)]


@rule("pixel_unshuffle", "input downscale_factor")
def channels_from_pixels(f: Following, call: Call, input: Value, downscale_factor: int) -> Axes:
    """(C, H r, W r) -> (C r r, H, W)."""
    *batch, channels, height, width = f.axes(input)
    r, reason = downscale_factor, "pixels"
    made = within([channels, fixed(r * r, reason)])
    return [*batch, made, fixed(height.size // r, reason), fixed(width.size // r, reason)]


@rule("channel_shuffle", "input groups")
def shuffled(f: Following, call: Call, input: Value, groups: int) -> Axes:
    """(g, n) channels -> (n, g)."""
    axes = f.axes(input)
    outer, inner = divide(axes[1], groups, axes[1].size // groups)
    return _with(axes, 1, within([inner, outer]))


@rule("unfold")
def unfolded(f: Following, call: Call) -> Axes | None:
    """Patches of an image as columns (B, C k k, L); or, of a tensor, stretches along an axis."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    if len(shape) == len(axes) + 1:
        dim = call.args[1] % len(axes)
        close(axes[dim], f"{f.title(call)} takes stretches of it")
        return [*_with(axes, dim, fixed(shape[dim], "stretches")), fixed(shape[-1], "a stretch")]
    if len(axes) == 4 and len(shape) == 3:
        taps = fixed(shape[1] // axes[1].size, "taps")
        return [axes[0], within([axes[1], taps]), fixed(shape[2], "patches")]
    return None


@rule("fold")
def folded(f: Following, call: Call) -> Axes | None:
    """Patches as columns (B, C k k, L) -> an image."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    if len(axes) != 3 or len(shape) != 4:
        return None
    kept, _ = divide(axes[1], shape[1], axes[1].size // shape[1])
    return [axes[0], kept, *(fixed(size, "pixels") for size in shape[2:])]
