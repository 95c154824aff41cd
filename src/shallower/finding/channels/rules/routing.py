"""Choosing among channels: a router's top-k, softmax and argmax, and what is made of the numbers that they give.

weights, experts = F.linear(x, router).softmax(-1).topk(2)      # two of the rows of `router` for each token
up[experts]                                                     # the first axis of `up` goes with these rows

A channel that is cut is one that is never chosen: see `Choice`.
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Layout, close, fixed, is_open, runs
from shallower.finding.channels.rules.arguments import dimensions, given, integer, integers
from shallower.finding.channels.rules.reducing import COMPARES, usual_axis, without
from shallower.recording.tracing import Call


def _choose(f: Following, call: Call, axes: Axes, dim: int, least: int = 1) -> Layout:
    """Note that a call chooses among the channels of an axis, so many of them."""
    layout, dim = axes[dim], dim % len(axes)
    if is_open(layout):
        f.mark(layout, "chosen")
        f.choices.append((layout, call, dim - len(axes), least))
    return layout


@rule("softmax log_softmax")
def shares(f: Following, call: Call) -> Axes:
    """Shares of one axis: nothing for what is never chosen. The others pass."""
    axes = f.axes(call.inputs[0])
    dim = given(call, 1, "dim")
    if dim is None:
        dim = usual_axis(call, len(axes))
    (dim,) = integers(dim)
    layout = _choose(f, call, axes, dim)
    if call.name == "softmax":
        f.unchosen[call.outputs[0]] = layout
    if dim in (-1, len(axes) - 1):
        for axis in axes[:-1]:
            f.mark(axis, "attended")
    return axes


@rule("topk")
def strongest(f: Following, call: Call) -> list[Axes]:
    """The largest of one axis, and their numbers."""
    axes = f.axes(call.inputs[0])
    count, dim = integer(call, 1, "k"), integer(call, 2, "dim", -1)
    if given(call, 3, "largest") is False:
        close(axes[dim], f"{f.title(call)} {COMPARES}")
    layout = _choose(f, call, axes, dim, max(1, count))
    axes[dim] = fixed(count, "the largest")
    if len(call.outputs) > 1:
        f.numbers[call.outputs[1]] = layout
    return [list(axes) for _ in call.outputs]


@rule("max argmax")
def largest(f: Following, call: Call) -> Axes | list[Axes]:
    """Two tensors elementwise, or the largest of an axis, and its number."""
    if len(call.inputs) == 2:
        return f.tied(call.inputs)
    axes = f.axes(call.inputs[0])
    dims = dimensions(call, len(axes))
    if len(dims) > 1:
        for dim in dims:
            close(axes[dim], f"{f.title(call)} {COMPARES}")
        return without(call, axes, dims)
    layout = _choose(f, call, axes, dims[0])
    if call.name == "argmax":
        f.numbers[call.outputs[0]] = layout
    elif len(call.outputs) > 1:
        f.numbers[call.outputs[1]] = layout
    return without(call, axes, dims)


@rule("sort")
def sorted_numbers(f: Following, call: Call) -> list[Axes]:
    """Positions of one axis in order: it stays as it is, the others pass."""
    axes = f.axes(call.inputs[0])
    (dim,) = integers(-1 if given(call, 1, "dim") is None else given(call, 1, "dim"))
    close(axes[dim], f"{f.title(call)} {COMPARES}")
    return [list(axes) for _ in call.outputs]


@rule("cumsum")
def running_sums(f: Following, call: Call) -> Axes:
    """Sums up to each position: of how often each was chosen, they are right without those that never are."""
    axes = f.axes(call.inputs[0])
    dim = integer(call, 1, "dim")
    counted = f.unchosen.get(call.inputs[0])
    if counted is None or list(runs(counted)) != list(runs(axes[dim])):
        close(axes[dim], f"{f.title(call)} {COMPARES}")
    return axes


@rule("one_hot")
def one_hot(f: Following, call: Call) -> Axes:
    """A vector for each number."""
    count = call.outputs[0].shape[-1]
    last: Layout = fixed(count, f"{f.title(call)} makes a vector for each number")
    numbers = call.inputs[0]
    if numbers in f.numbers and f.numbers[numbers].size == count:
        last = f.unchosen[call.outputs[0]] = f.numbers[numbers]
    return [*f.axes(numbers), last]


@rule("histc bincount")
def how_often(f: Following, call: Call) -> Axes:
    """How often each number comes; of other numbers they are counted by size."""
    numbers, (count,) = call.inputs[0], call.outputs[0].shape
    bins: Layout = fixed(count, f"{f.title(call)} counts")
    if call.name == "histc" and [given(call, 2, "min"), given(call, 3, "max")] != [0, count - 1]:
        raise UnknownUseError
    if len(call.inputs) > 1:
        raise UnknownUseError
    for axis in f.axes(numbers):
        close(axis, f"{f.title(call)} counts its positions")
    if numbers in f.numbers:
        if f.numbers[numbers].size != count:
            raise UnknownUseError
        bins = f.unchosen[call.outputs[0]] = f.numbers[numbers]
    return [bins]
