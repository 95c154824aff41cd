"""Operations that make tensors of numbers, of no channels.

torch.zeros(8)              # eight equal numbers: as many as whatever they meet
torch.arange(8)             # numbers that depend on their place: they stay
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import Run, fixed
from shallower.finding.channels.rules.arguments import integer
from shallower.recording.tracing import Call


@rule("zeros ones empty full new_zeros new_ones new_empty new_full")
def equal(_: Following, call: Call) -> Axes:
    """Numbers that are all alike; whether their count follows is found by trying."""
    axes: Axes = []
    for size in call.outputs[0].shape:
        axes.append(Run(size))
    return axes


@rule(
    """
    rand randn
    arange linspace logspace eye tensor as_tensor scalar_tensor new_tensor asarray from_numpy randint randperm
    hann_window hamming_window blackman_window bartlett_window kaiser_window tril_indices triu_indices vander
    """
)
def numbered(f: Following, call: Call) -> Axes:
    """Numbers that depend on their place."""
    for value in call.inputs:
        f.close_axes(value, f"{f.title(call)} makes another tensor of its numbers")
    axes: Axes = []
    for size in call.outputs[0].shape:
        axes.append(fixed(size, f"{f.title(call)} makes a number for each place"))
    return axes


@rule("meshgrid")
def grids(f: Following, call: Call) -> list[Axes]:
    """Vectors as coordinates: each has an axis in all results."""
    axes: Axes = []
    for value in call.inputs:
        axes += f.axes(value)
    if call.kwargs.get("indexing") == "xy" and len(axes) > 1:
        axes[0], axes[1] = axes[1], axes[0]
    return [list(axes) for _ in call.outputs]


@rule("diag_embed")
def diagonal_matrices(f: Following, call: Call) -> Axes:
    """(..., n) -> (..., n, n)."""
    offset, first, second = integer(call, 1, "offset", 0), integer(call, 2, "dim1", -2), integer(call, 3, "dim2", -1)
    *axes, last = f.axes(call.inputs[0])
    if (offset, first, second) != (0, -2, -1):
        f.close_axes(call.inputs[0], f"{f.title(call)} writes it along a diagonal")
        return [fixed(size, "a diagonal") for size in call.outputs[0].shape]
    return [*axes, last, last]
