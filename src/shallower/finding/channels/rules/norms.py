"""Norms: each channel by its own numbers, or all by their common size.

F.batch_norm(x, mean, variance, weight, bias)       # vectors go with axis 1
F.layer_norm(x, (width,), weight, bias)             # likewise with the last; the run is marked "averaged"
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Layout, close, divide, tie
from shallower.finding.channels.rules.arguments import given, integer, integers, optional, tensor
from shallower.modules.prepared.weight_norms import is_weight_norm
from shallower.recording.tracing import Call


@rule("batch_norm")
def batch_norm(f: Following, call: Call) -> Axes:
    """Each channel by its own numbers."""
    axes = f.axes(tensor(call, 0, "input"))
    _tie_vectors(f, call, axes[1], ("running_mean", "running_var", "weight", "bias"))
    if given(call, 1, "running_mean") is None:
        _averaged(f, axes[:1] + axes[2:])
    return axes


@rule("instance_norm")
def instance_norm(f: Following, call: Call) -> Axes:
    """Each channel by its own average over pixels."""
    axes = f.axes(tensor(call, 0, "input"))
    _tie_vectors(f, call, axes[1], ("running_mean", "running_var", "weight", "bias"))
    _averaged(f, axes[2:])
    return axes


def _tie_vectors(f: Following, call: Call, channels: Layout, names: tuple[str, ...], first: int = 1) -> None:
    for i, name in enumerate(names):
        vector = optional(call, first + i, name)
        if vector is not None:
            tie(channels, f.axes(vector)[0])


def _averaged(f: Following, axes: Axes) -> None:
    for axis in axes:
        f.mark(axis, "averaged")


@rule("layer_norm rms_norm")
def layer_norm(f: Following, call: Call) -> Axes:
    """All channels by their common size."""
    axes = f.axes(tensor(call, 0, "input"))
    count = len(integers(given(call, 1, "normalized_shape")))
    for vector in (optional(call, 2, "weight"), optional(call, 3, "bias")):
        if vector is not None:
            for axis, own in zip(axes[-count:], f.axes(vector), strict=True):
                tie(axis, own)
    _averaged(f, axes[-count:])
    return axes


@rule("group_norm")
def group_norm(f: Following, call: Call) -> Axes:
    """Groups of channels by their common size: whole groups may go."""
    values = tensor(call, 0, "input")
    axes, groups = f.axes(values), integer(call, 1, "num_groups")
    _tie_vectors(f, call, axes[1], ("weight", "bias"), first=2)
    outer, each = divide(axes[1], groups, axes[1].size // groups)
    if vars(call.frame.module).get("num_groups") != groups or optional(call, 2, "weight") is None:
        close(outer, f"{f.title(call)} has a number of groups that does not follow")
    _averaged(f, [each, *axes[2:]])
    return f.axes(values)


@rule("normalize")
def unit_length(f: Following, call: Call) -> Axes:
    """Zeros add nothing to a length."""
    if given(call, 1, "p") not in (None, 1, 2, 1.0, 2.0):
        raise UnknownUseError
    return f.axes(tensor(call, 0, "input"))


@rule("weight_norm")
def weight_norm(f: Following, call: Call) -> Axes:
    """g v / |v|, with a length for each position of one axis; surgery lets those of PyTorch's own layers follow."""
    direction, size = tensor(call, 0, "v"), tensor(call, 1, "g")
    axes, dim = f.broadcast(f.axes(direction), f.axes(size)), integer(call, 2, "dim", 0)
    if is_weight_norm(call.frame.module):
        return axes
    for i, axis in enumerate(axes):
        if i != dim:
            f.mark(axis, "averaged")
    return axes


@rule("local_response_norm")
def response_norm(f: Following, call: Call) -> Axes:
    """Each channel by its neighbours."""
    raise UnknownUseError(f"{f.title(call)} divides each channel by its neighbours")
