"""Operations on each element by itself: what stands at the same place goes together.

F.relu(x)                   # the axes of x
x + y                       # axes at the same place from the right go together
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import close, divide, fixed, tie
from shallower.finding.channels.rules.arguments import integer, tensor
from shallower.finding.channels.weights import is_picked
from shallower.finding.pointwise import DROPOUT, stays_on
from shallower.recording.tracing import Call

ALONE = """
    relu relu6 gelu silu tanh sigmoid hardswish hardtanh hardsigmoid leaky_relu elu selu celu mish softplus softsign
    log_sigmoid
    logsigmoid tanhshrink softshrink hardshrink threshold rrelu erf erfc erfinv exp expm1 exp2 abs square sin cos tan
    sinh cosh asin acos atan asinh acosh atanh log log1p log2 log10 sqrt rsqrt reciprocal sign sgn round floor ceil
    trunc fix frac neg positive logit nan_to_num isnan isinf isfinite signbit logical_not bitwise_not invert angle conj
    conj_physical resolve_conj real imag get.real get.imag deg2rad rad2deg digamma lgamma i0 special_i0 sinc
    contiguous to float half bfloat16 double int long short bool byte cpu cuda type type_as clone detach alias get.data
    lift_fresh requires_grad pin_memory fill zero zeros_like ones_like empty_like full_like
    fake_quantize_per_tensor_affine set.data isin bucketize
"""
TOGETHER = """
    add sub mul div pow maximum minimum where addcmul addcdiv lerp atan2 arctan2 fmod remainder floor_divide floordiv
    mod logaddexp logaddexp2 eq ne ge gt le lt greater greater_equal less less_equal not_equal heaviside
    logical_and logical_or logical_xor bitwise_and bitwise_or
    bitwise_xor and or xor rshift lshift float_power copy hypot fmin fmax xlogy clamp clamp_min clamp_max masked_fill
    rsub polar complex copysign nextafter ldexp isclose rfloordiv rmod
"""


@rule(ALONE)
def alone(f: Following, call: Call) -> Axes:
    """One tensor in, one of its shape out; the others only give a type, a shape or boundaries."""
    if not call.inputs:
        raise UnknownUseError
    for value in call.inputs[1:]:
        if call.name in ("isin", "bucketize"):
            f.close_axes(value, f"{f.title(call)} compares numbers with all of its channels")
    return f.axes(call.inputs[0])


@rule(TOGETHER)
def together(f: Following, call: Call) -> Axes:
    """Several tensors, broadcast against each other."""
    output = call.outputs[0]
    if call.name == "where" and len(call.inputs) == 1 and len(call.args) + len(call.kwargs) == 1:
        raise UnknownUseError(f"{f.title(call)} picks positions by the numbers it reads")
    axes = f.tied(call.inputs)
    if call.name == "add":
        # the biases of each token's expert make no sum of two streams
        whole = [value for value in call.inputs if value.fed and value.shape == output.shape and not is_picked(value)]
        if len(whole) > 1:
            f.sums.append(call)
    return axes


@rule(" ".join(DROPOUT))
def dropped(f: Following, call: Call) -> Axes:
    """Nothing is dropped in eval mode; where something is, it is other numbers that go of fewer channels."""
    if stays_on(call):
        raise UnknownUseError(f"{f.title(call)} drops channels at random even in eval mode")
    return f.axes(call.inputs[0])


@rule("rand_like randn_like randint_like uniform normal bernoulli exponential trunc_normal cauchy log_normal geometric")
def noise(f: Following, call: Call) -> Axes:
    """Random numbers are others where there are fewer."""
    raise UnknownUseError(f"{f.title(call)} makes random numbers even in eval mode")


@rule("prelu")
def slopes(f: Following, call: Call) -> Axes:
    """A slope for each channel of axis 1, or one for all."""
    axes, (slope,) = f.axes(tensor(call, 0, "input")), f.axes(tensor(call, 1, "weight"))
    if slope.size > 1:
        tie(axes[min(1, len(axes) - 1)], slope)
    return axes


@rule("glu")
def gated(f: Following, call: Call) -> Axes:
    """The second half gates the first, which stays as large."""
    axes = f.axes(tensor(call, 0, "input"))
    dim = integer(call, 1, "dim", -1)
    halves, each = divide(axes[dim], 2, axes[dim].size // 2)
    close(halves, f"{f.title(call)} reads two halves")
    axes[dim] = each
    return axes


@rule("view_as_complex")
def complex_numbers(f: Following, call: Call) -> Axes:
    """(..., 2) -> (...)."""
    *axes, pair = f.axes(call.inputs[0])
    close(pair, "two numbers make one complex number")
    return axes


@rule("view_as_real")
def real_numbers(f: Following, call: Call) -> Axes:
    """(...) -> (..., 2)."""
    return [*f.axes(call.inputs[0]), fixed(2, "two numbers make one complex number")]
