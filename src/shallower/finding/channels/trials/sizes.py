"""Which of the numbers that a call is given are sizes of axes, and of which channels.

sizes_of(f, call)       # [Sizing(place=3, layout=...)]: the third thing that x.view(batch, length, width) is given
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shallower.finding.channels.following import UNFORESEEN, Axes, Following
from shallower.finding.channels.layout import Layout, Run, divide, fixed, is_open, parts_of, resolved, size_of
from shallower.modules.written import leaves, with_leaves
from shallower.recording.tracing import Call, Value

GROUPED = {"group_norm": 1, "conv1d": 6, "conv2d": 6, "conv3d": 6, "channel_shuffle": 1}
"""Functions that divide axis 1 into a number of groups, and where among their arguments that stands."""


@dataclass(frozen=True)
class Sizing:
    """A number that says how many positions there are.

    Attributes:
        place: which of what the call is given, as in `Written`.
        given: the number in the recorded pass.
        layout: the positions.
        negative: whether it counts them from the end.
        bounds: the layout of the whole axis, where it is a bound of a slice.
        stays: whether it is a number to compute with, made of the sizes of channels: the same where fewer are left.
    """

    place: int
    given: float
    layout: Layout
    negative: bool = False
    bounds: Layout | None = None
    stays: bool = False

    def expected(self, fewer: Mapping[Run, int]) -> float:
        """The number when some runs have fewer channels."""
        if self.stays:
            return self.given
        size = size_of(self.layout, fewer)
        return -size if self.negative else size

    def is_right(self, number: float, fewer: Mapping[Run, int]) -> bool:
        """Whether a number does what the expected one does: a slice may go beyond the end."""
        wanted = self.expected(fewer)
        if number == wanted:
            return True
        if self.bounds is None:
            return False
        length = size_of(self.bounds, fewer)
        return range(length)[slice(int(number))] == range(length)[slice(int(wanted))]


Pairs = Iterator[tuple[int, Layout]]


class _Given:
    """The arguments of a call beside their places."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.numbers = leaves(call.args, call.kwargs)
        places = dict(zip(range(len(self.numbers)), range(len(self.numbers)), strict=True))
        self.places, self.named = with_leaves(call.args, call.kwargs, places)

    def at(self, position: int, *names: str) -> Any:
        """The places of an argument, in its own form; None where it is left out."""
        if position < len(self.places):
            return self.places[position]
        for name in names:
            if name in self.named:
                return self.named[name]
        return None

    def all_from(self, position: int, *names: str) -> list[int]:
        """The places of all arguments from one on, and of those with a name."""
        return leaves(self.places[position:], {name: self.named[name] for name in names if name in self.named})

    def whole(self, place: int) -> int | None:
        """The number at a place, where it is one."""
        number = self.numbers[place]
        return number if type(number) is int else None


def sizes_of(f: Following, call: Call) -> list[Sizing]:
    """The sizes that a call is given, without those that are -1."""
    find = _FINDERS.get(call.name)
    if find is None or not call.outputs:
        return []
    given = _Given(call)
    found: list[Sizing] = []
    try:
        if call.name in ("getitem", "setitem"):
            return list(_slices(f, call, given))
        for place, layout in find(f, call, given):
            number = given.whole(place)
            if number is not None and number == layout.size:
                found.append(Sizing(place, number, resolved(layout)))
    except UNFORESEEN:
        return []
    return found


def _each_axis(axes: Axes, places: Sequence[int]) -> Pairs:
    if len(axes) == len(places):
        yield from zip(places, axes, strict=True)


def _new_shape(f: Following, call: Call, given: _Given) -> Pairs:
    return _each_axis(f.axes(call.outputs[0]), given.all_from(1, "shape", "size"))


def _from_sizes(f: Following, call: Call, given: _Given) -> Pairs:
    return _each_axis(f.axes(call.outputs[0]), given.all_from(0, "size"))


def _all_alike(f: Following, call: Call, given: _Given) -> Pairs:
    at = 1 if call.name == "new_full" else 0
    return _each_axis(f.axes(call.outputs[0]), leaves([given.at(at, "size")], {}))


def _of_one_axis(f: Following, call: Call, given: _Given) -> Pairs:
    axes, places = f.axes(call.outputs[0]), leaves([given.at(2, "sizes")], {})
    start = (given.numbers[given.at(1, "dim")]) % (len(axes) - len(places) + 1)
    return _each_axis(axes[start : start + len(places)], places)


def _per_axis(f: Following, call: Call, given: _Given) -> Pairs:
    """Only where one position is repeated do repetitions say how many positions there are."""
    axes, places = f.axes(call.outputs[0]), given.all_from(1, "repeats", "dims")
    own = f.axes(call.inputs[0])
    own = [*[fixed(1, "")] * (len(axes) - len(own)), *own]
    if len(axes) == len(places):
        for place, axis, before in zip(places, axes, own, strict=True):
            if before.size == 1:
                yield place, axis


def _parts(f: Following, call: Call, given: _Given) -> Pairs:
    place = given.at(1, "split_size", "split_sizes", "split_size_or_sections", "indices_or_sections")
    at = given.at(2, "dim")
    dim = 0 if at is None else given.numbers[at]
    parts = [f.axes(value)[dim] for value in call.outputs]
    if isinstance(place, int):
        if call.name != "tensor_split":
            yield place, parts[0]
        return
    if call.name == "tensor_split":
        whole = f.axes(call.inputs[0])[dim]
        for own in place:
            yield own, _front(whole, given.numbers[own])
        return
    if any(
        map(is_open, parts)
    ):  # rows of the inputs are shared out by numbers that they hold: to experts, for instance
        yield from zip(place, parts, strict=True)


def _stretch(f: Following, call: Call, given: _Given) -> Pairs:
    dim, start = given.numbers[given.at(1, "dim")], given.at(2, "start")
    axes = f.axes(call.inputs[0])
    yield given.at(3, "length"), f.axes(call.outputs[0])[dim]
    if given.numbers[start]:
        yield start, _front(axes[dim], given.numbers[start])


def _last_axes(f: Following, call: Call, given: _Given) -> Pairs:
    places = leaves([given.at(1, "normalized_shape")], {})
    return _each_axis(f.axes(call.inputs[0])[-len(places) :], places)


def _resized(f: Following, call: Call, given: _Given) -> Pairs:
    places = leaves([given.at(1, "size")], {})
    return _each_axis(f.axes(call.outputs[0])[-len(places) :], places)


def _edges(f: Following, call: Call, given: _Given) -> Pairs:
    places = leaves([given.at(1, "pad")], {})
    before, after = f.axes(call.inputs[0]), f.axes(call.outputs[0])
    for i, pair in enumerate(zip(places[::2], places[1::2], strict=True), 1):
        left, right = (given.numbers[place] for place in pair)
        if min(left, right) < 0 or not is_open(before[-i]):
            continue
        parts = parts_of(after[-i], [left, before[-i].size, right])
        yield from zip(pair, (parts[0], parts[2]), strict=True)


def _of_attention(f: Following, call: Call, given: _Given) -> Pairs:
    columns = f.axes(_argument(call, 11, "out_proj_weight"))[1]
    heads = given.at(4, "num_heads")
    count = given.numbers[heads]
    yield given.at(3, "embed_dim_to_check"), f.axes(_argument(call, 0, "query"))[-1]
    yield heads, divide(columns, count, columns.size // count)[0]


def _argument(call: Call, position: int, name: str) -> Value:
    value: Value = call.args[position] if position < len(call.args) else call.kwargs[name]
    return value


def _into_groups(f: Following, call: Call, given: _Given) -> Pairs:
    place = given.at(GROUPED[call.name], "num_groups", "groups")
    groups = None if place is None else given.whole(place)
    if groups is not None and groups > 1:
        channels = f.axes(call.inputs[0])[1]
        yield place, divide(channels, groups, channels.size // groups)[0]


def _slices(f: Following, call: Call, given: _Given) -> Iterator[Sizing]:
    """The bounds of slices."""
    items, places = call.args[1], given.places[1]
    if not isinstance(items, tuple):
        items, places = (items,), (places,)
    axes = f.axes(call.inputs[0])
    taken = [_axes_taken(item) for item in items]
    rest = len(axes) - sum(taken)
    at = 0
    for item, place, count in zip(items, places, taken, strict=True):
        if item is Ellipsis:
            at += rest
        elif isinstance(item, slice):
            yield from _bounds(axes[at], item, place)
        at += count


def _axes_taken(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Value) and len(item.shape) > 1:
        raise ValueError("a mask, perhaps")
    return 1


def _bounds(axis: Layout, item: slice, place: slice) -> Iterator[Sizing]:
    for bound, where in ((item.start, place.start), (item.stop, place.stop)):
        if type(bound) is not int or not is_open(axis) or item.step not in (None, 1):
            continue
        if 0 < bound <= axis.size:
            yield Sizing(where, bound, _front(axis, bound), bounds=axis)
        elif -axis.size < bound < 0:
            rest = parts_of(axis, [axis.size + bound, -bound])[1]
            yield Sizing(where, bound, rest, negative=True, bounds=axis)


def _front(axis: Layout, count: int) -> Layout:
    return parts_of(axis, [count, axis.size - count])[0]


_Finder = Callable[[Following, Call, _Given], Pairs]


def _of_slices(_: Following, __: Call, ___: _Given) -> Pairs:
    yield from ()


_FINDERS: dict[str, _Finder] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _new_shape),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _from_sizes),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _new_shape),
    **dict.fromkeys(("full", "new_full"), _all_alike),
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "tensor_split"), _parts),
    **dict.fromkeys(("layer_norm", "rms_norm"), _last_axes),
    **dict.fromkeys(("repeat", "tile"), _per_axis),
    **dict.fromkeys(("getitem", "setitem"), _of_slices),
    **dict.fromkeys(GROUPED, _into_groups),
    "unflatten": _of_one_axis,
    "narrow": _stretch,
    "interpolate": _resized,
    "pad": _edges,
    "multi_head_attention_forward": _of_attention,
}

OTHER_SIZES = {"as_strided", "constant_pad_nd", "slice", "histc", "bincount", "one_hot"}

SIZED = (set(_FINDERS) - set(GROUPED)) | OTHER_SIZES
"""Functions to which forwards give sizes as whole numbers. To others they give numbers to compute with."""
