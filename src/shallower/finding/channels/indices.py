"""Whole numbers that name channels: the experts that a router has chosen for each token.

    f.numbers[indices]                  # the layout whose channels these numbers are

Such numbers may be moved, sorted, and used to pick positions or to count them: where channels are cut, those that
stay are numbered anew in the same order. Whatever else computes with them closes their channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shallower.finding.channels.layout import Layout, close, tie
from shallower.recording.tracing import Call, Value

if TYPE_CHECKING:
    from shallower.finding.channels.following import Following

MOVING = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "get.T", "to",
    "long", "int", "float", "type", "contiguous", "clone", "detach", "getitem", "select", "expand", "expand_as",
    "unbind", "chunk", "split", "narrow", "repeat", "repeat_interleave", "index_select", "sort", "alias", "flip",
}  # fmt: skip
"""Functions that give the numbers of their first argument, in other places."""

NAMING = {
    "getitem", "gather", "take_along_dim", "index_select", "scatter", "scatter_add", "index_add", "one_hot", "histc",
    "bincount", "argsort", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "type_as",
}  # fmt: skip
"""Functions whose rules know what the numbers name, or that read none."""

JOINING = {"cat", "concat", "concatenate", "stack", "hstack"}
"""Functions that give the numbers of all their arguments."""

BLANK = {"zeros", "zeros_like", "new_zeros"}


def carry_indices(f: Following, call: Call) -> None:
    """Say of a call's results that they are numbers of channels, or close the channels where it computes with them."""
    if call.name in JOINING and call.inputs and f.numbers.keys() >= set(call.inputs):
        _join(f, call)
        return
    for value in call.inputs:
        if value not in f.numbers:
            continue
        if call.name in MOVING and value is call.inputs[0]:
            # of a sort the second result says where each was
            for made in call.outputs[:1] if call.name == "sort" else call.outputs:
                f.numbers[made] = f.numbers[value]
        elif call.name == "eq" and len(call.inputs) == 1 and call.args[-1] in range(f.numbers[value].size):
            f.turns.own(call, f.numbers[value], call.args[-1])
        elif call.name not in NAMING or not call.outputs:
            close(f.numbers[value], f"{f.title(call)} computes with the numbers of its channels")


def _join(f: Following, call: Call) -> None:
    """Numbers side by side name one kind of channels: those of all of them go together."""
    first = f.numbers[call.inputs[0]]
    for value in call.inputs[1:]:
        other = f.numbers[value]
        if other.size == first.size:
            tie(first, other)
        else:
            close(first, f"{f.title(call)} joins numbers of different channels")
            close(other, f"{f.title(call)} joins numbers of different channels")
    f.numbers[call.outputs[0]] = first


def named(f: Following, axis: Layout, numbers: Value) -> bool:
    """Whether numbers name the positions of an axis, which go with the channels that they are numbers of."""
    layout = f.numbers.get(numbers)
    if layout is None or layout.size != axis.size:
        return False
    tie(axis, layout)
    return True


def close_positions(f: Following, numbers: Value) -> None:
    """The positions at which numbers stand cannot be cut; what they are numbers of may be."""
    for axis in f.axes(numbers):
        close(axis, "positions that are picked by number")


def is_blank(f: Following, value: Value) -> bool:
    """Whether a tensor is made of zeros, or is zero at channels that were never chosen."""
    return value in f.unchosen or (value.call is not None and value.call.name in BLANK)
