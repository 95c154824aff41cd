"""Operations over an axis: sums, averages, norms, pooling, softmax."""

from __future__ import annotations

from typing import Any

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import ONE, close, divide, fixed, mark, tie
from shallower.finding.channels.rules.moving import integers
from shallower.recording.tracing import Call, Value


def _dims(call: Call, count: int, at: int = 1) -> list[int]:
    given = call.args[at] if len(call.args) > at else call.kwargs.get("dim", call.kwargs.get("axis"))
    if given is None:
        return list(range(count))
    return [dim % count for dim in integers([given])]


def _without(f: Following, call: Call, axes: Axes, dims: list[int]) -> list[Axes]:
    kept = len(call.outputs[0].shape) == len(axes)
    found: Axes = []
    for i, axis in enumerate(axes):
        if i not in dims:
            found.append(axis)
        elif kept:
            found.append(fixed(1, ONE))
    return [list(found) for _ in call.outputs]


@rule("sum nansum")
def summed(f: Following, call: Call) -> list[Axes]:
    """Zeros add nothing, so that a channel may be left out of a sum."""
    axes = f.axes(call.inputs[0])
    dims = _dims(call, len(axes))
    for dim in dims:
        f.contracted.append((axes[dim], call))
    return _without(f, call, axes, dims)


@rule("mean var std var_mean std_mean nanmean")
def averaged(f: Following, call: Call) -> list[Axes]:
    """An average over channels is another one over fewer."""
    axes = f.axes(call.inputs[0])
    dims = _dims(call, len(axes))
    for dim in dims:
        mark(axes[dim], "averaged")
    return _without(f, call, axes, dims)


@rule("norm vector_norm linalg_vector_norm linalg_norm", "input p dim")
def length(f: Following, call: Call, input: Value, p: Any, dim: Any) -> list[Axes]:
    """Zeros add nothing to a length."""
    axes = f.axes(input)
    dims = [d % len(axes) for d in integers([dim])] if dim is not None else list(range(len(axes)))
    return _without(f, call, axes, dims)


@rule("max min amax amin argmax argmin prod any all median logsumexp kthvalue mode count_nonzero")
def extreme(f: Following, call: Call) -> Axes | list[Axes]:
    """Two tensors elementwise, or the extreme of an axis, which a zero may be."""
    if len(call.inputs) == 2 and call.name in ("max", "min"):
        return f.tied(call.inputs, call.outputs[0].shape)
    axes = f.axes(call.inputs[0])
    dims = _dims(call, len(axes))
    for dim in dims:
        close(axes[dim], f"{f.title(call)} compares its channels with each other")
    return _without(f, call, axes, dims)


@rule("softmax log_softmax cumsum cumprod softmin gumbel_softmax sort argsort logcumsumexp cummax cummin", "input dim")
def along(f: Following, call: Call, input: Value, dim: Any) -> list[Axes]:
    """Positions of one axis compete: it stays as it is, the others pass."""
    axes = f.axes(input)
    where = dim if isinstance(dim, int) else -1
    close(axes[where], f"{f.title(call)} compares its channels with each other")
    if "softmax" in call.name:
        for axis in axes:
            mark(axis, "attended")
    return [list(axes) for _ in call.outputs]


@rule("topk", "input k dim")
def best(f: Following, call: Call, input: Value, k: int, dim: Any) -> list[Axes]:
    """The largest of one axis."""
    axes = f.axes(input)
    where = dim if isinstance(dim, int) else -1
    close(axes[where], f"{f.title(call)} compares its channels with each other")
    axes[where] = fixed(call.outputs[0].shape[where], "the largest")
    return [list(axes) for _ in call.outputs]


# ------------------------------------------------------------------------------------------------- norms


@rule("batch_norm", "input running_mean running_var weight bias")
def batch_norm(f: Following, call: Call, input: Value, *vectors: Value | None) -> Axes:
    """Each channel by its own numbers."""
    return _each(f, input, vectors)


@rule("instance_norm", "input running_mean running_var weight bias")
def instance_norm(f: Following, call: Call, input: Value, *vectors: Value | None) -> Axes:
    """Each channel by its own average over pixels."""
    return _each(f, input, vectors)


def _each(f: Following, input: Value, vectors: tuple[Value | None, ...]) -> Axes:
    axes = f.axes(input)
    for vector in vectors:
        if isinstance(vector, Value):
            tie(axes[1], f.axes(vector)[0])
    return axes


@rule("layer_norm rms_norm", "input shape weight bias")
def layer_norm(f: Following, call: Call, input: Value, shape: Any, weight: Any, bias: Any) -> Axes:
    """All channels by their common size."""
    axes = f.axes(input)
    count = len(integers([shape]))
    for vector in (weight, bias):
        if isinstance(vector, Value):
            for axis, own in zip(axes[-count:], f.axes(vector), strict=True):
                tie(axis, own)
    for axis in axes[-count:]:
        mark(axis, "averaged")
    return axes


@rule("group_norm", "input groups weight bias")
def group_norm(f: Following, call: Call, input: Value, groups: int, weight: Any, bias: Any) -> Axes:
    """Groups of channels by their common size: whole groups may go."""
    axes = f.axes(input)
    for vector in (weight, bias):
        if isinstance(vector, Value):
            tie(axes[1], f.axes(vector)[0])
    _, each = divide(axes[1], groups, axes[1].size // groups)
    mark(each, "averaged")
    return f.axes(input)


@rule("normalize", "input p dim")
def unit_length(f: Following, call: Call, input: Value, p: Any, dim: Any) -> Axes:
    """Zeros add nothing to a length."""
    return f.axes(input)


# ------------------------------------------------------------------------------------------------- pixels


@rule(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate
    upsample max_pool1d_with_indices max_pool2d_with_indices adaptive_max_pool2d_with_indices grid_sample
    """
)
def pooled(f: Following, call: Call) -> list[Axes] | None:
    """Each channel of an image by itself."""
    axes = f.axes(call.inputs[0])
    dims = 2 if "2d" in call.name else 3 if "3d" in call.name else 1 if "1d" in call.name else len(axes) - 2
    found = []
    for value in call.outputs:
        sizes = value.shape[len(value.shape) - dims :]
        found.append([*axes[: len(axes) - dims], *(fixed(size, "pixels") for size in sizes)])
    return found
