"""Operations on each element by itself: what stands at the same place goes together."""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import ONE, Run, divide, fixed, tie
from shallower.finding.pointwise import DROPOUT, NONLINEAR, UNCHANGED
from shallower.recording.tracing import Call, Value

OTHERS = """
    cpu cuda positive fill zero uniform normal bernoulli zeros_like ones_like empty_like full_like rand_like randn_like
    logit nan_to_num isnan isinf isfinite logical_not bitwise_not invert erfinv get.real angle conj long bool int short
    log2 acos asin frac neg masked_fill zero_
"""
BINARY = """
    add sub mul div pow maximum minimum where addcmul addcdiv lerp atan2 fmod remainder floor_divide logaddexp eq ne ge
    gt le lt heaviside logical_and logical_or logical_xor bitwise_and bitwise_or and or xor float_power copy floordiv
    mod hypot fmin fmax xlogy clamp clamp_min clamp_max masked_fill rsub
"""


@rule(" ".join(NONLINEAR | UNCHANGED | DROPOUT) + OTHERS)
def same(f: Following, call: Call) -> Axes | None:
    """One tensor in, one of its shape out; the others only give a type or a shape."""
    return f.axes(call.inputs[0]) if call.inputs else None


@rule(BINARY)
def together(f: Following, call: Call) -> Axes:
    """Several tensors, broadcast against each other."""
    output = call.outputs[0]
    axes = f.tied(call.inputs, output.shape)
    if call.name == "add" and len([v for v in call.inputs if v.fed and v.shape == output.shape]) > 1:
        f.sums += axes
    return axes


@rule("prelu", "input weight")
def slopes(f: Following, call: Call, input: Value, weight: Value) -> Axes:
    """A slope for each channel of axis 1, or one for all."""
    axes, slope = f.axes(input), f.axes(weight)[0]
    if slope.size > 1:
        tie(axes[min(1, len(axes) - 1)], slope)
    return axes


@rule("glu", "input dim")
def gated(f: Following, call: Call, input: Value, dim: int | None) -> Axes:
    """The second half gates the first."""
    axes, axis = f.axes(input), -1 if dim is None else dim
    _, axes[axis] = divide(axes[axis], 2, axes[axis].size // 2)
    return axes


@rule("zeros ones empty full arange rand randn new_zeros new_ones new_empty new_full eye linspace tensor scalar_tensor")
def constants(f: Following, call: Call) -> Axes:
    """A tensor of numbers; whether its size follows is found by trying."""
    axes: Axes = []
    for size in call.outputs[0].shape:
        axes.append(Run(size) if size > 1 else fixed(size, ONE))
    return axes
