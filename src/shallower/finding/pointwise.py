"""Which functions act on each element by itself, and what else may stand around an activation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shallower.recording.tracing import Call, Frame, Value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NONLINEAR = _names(
    """
    relu relu6 gelu silu tanh sigmoid hardswish hardtanh hardsigmoid leaky_relu elu selu celu mish softplus
    softsign logsigmoid tanhshrink softshrink hardshrink threshold rrelu prelu erf erfc exp expm1 clamp clamp_min
    clamp_max abs square pow sin cos sinh cosh atan asinh log log1p logaddexp sqrt rsqrt reciprocal maximum
    minimum where float_power sign heaviside ge gt le lt round floor ceil trunc tan
    """
)
"""Functions that act on each element by itself and are not affine."""

AFFINE = _names("add sub mul div neg positive addcmul addcdiv lerp")
"""Functions that act on each element by itself and are affine where all but one argument are constants."""

COMPARISONS = _names("sign heaviside ge gt le lt")

ACTIVATIONS = _names(
    """
    relu relu6 gelu silu tanh sigmoid hardswish hardtanh hardsigmoid leaky_relu elu selu celu mish softplus
    softsign logsigmoid tanhshrink softshrink hardshrink threshold rrelu prelu erf clamp clamp_min
    """
)
"""Functions that make a chain of pointwise calls an activation wherever it stands."""

UNCHANGED = _names(
    "contiguous to float half bfloat16 double type type_as clone detach alias get.data lift_fresh requires_grad"
)
"""Functions that keep every element where and what it is."""

DROPOUT = _names(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d native_dropout"
)
"""Functions that are the identity at inference."""

PRODUCTS = _names(
    """
    linear addmm matmul mm bmm einsum baddbmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d bilinear convolution
    """
)
"""Functions that are linear maps where one argument is a weight."""


def moving(call: Call) -> list[Value]:
    """The inputs of a pointwise call that are not constants: more than one element, or fed by the inputs."""
    inputs = call.inputs[:1] if call.name == "prelu" or call.name in UNCHANGED else call.inputs
    return [value for value in inputs if value.elements > 1 or value.fed]


def is_pointwise(call: Call) -> bool:
    """Whether each element of the result depends on the same element of the inputs only."""
    if call.name in UNCHANGED or call.name in DROPOUT:
        return len(call.inputs) >= 1
    if call.name in ("max", "min"):
        return False
    return (call.name in NONLINEAR or call.name in AFFINE) and len(call.outputs) == 1 and bool(moving(call))


def is_nonlinear(calls: Iterable[Call]) -> bool:
    """Whether a chain of pointwise calls is an activation, not just a scale and a shift."""
    return any(call.name in NONLINEAR or (call.name == "mul" and len(moving(call)) > 1) for call in calls) or any(
        call.name == "mul" and call.inputs and len(call.inputs) == 1 and not _has_number(call) for call in calls
    )


def _has_number(call: Call) -> bool:
    return any(isinstance(item, (int, float)) for item in (*call.args, *call.kwargs.values()))


def stays_on(call: Call) -> bool:
    """Whether a dropout, recorded in eval mode, drops even there."""
    given = dict(zip(("input", "p", "training"), call.args, strict=False)) | dict(call.kwargs)
    training = given.get("training", given.get("train", "alpha" not in call.name))
    return bool(training) and given.get("p", 0.5) > 0


def averages_all(call: Call) -> bool:
    """Whether a call is the average over all pixels of an image (B, C, H, W): adaptive pooling to 1x1, or a mean."""
    if not call.inputs or not call.outputs or len(call.inputs[0].shape) != 4:
        return False
    batch, channels, *size = call.inputs[0].shape
    if call.outputs[0].shape not in ((batch, channels), (batch, channels, 1, 1)):
        return False
    if call.name == "avg_pool2d":
        kernel = call.args[1] if len(call.args) > 1 else call.kwargs.get("kernel_size")
        kernel = [kernel] * 2 if isinstance(kernel, int) else list(kernel or ())
        return kernel == size and len(call.args) < 4 and not set(call.kwargs) - {"kernel_size", "stride"}
    if call.name == "mean":
        dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and {dim % 4 for dim in dims} == {2, 3}
    return call.name == "adaptive_avg_pool2d"


_SPLITTING = _names("chunk split tensor_split unsafe_chunk unsafe_split split_with_sizes")
_FLATTENING = _names("flatten view reshape squeeze getitem")
_POOLS_OF_IMAGES = _names("max_pool2d avg_pool2d adaptive_max_pool2d adaptive_avg_pool2d interpolate upsample")


def pools(call: Call) -> bool:
    """Whether a call pools or resizes images, each channel in the same way and constants to themselves."""
    if call.name not in _POOLS_OF_IMAGES or not call.inputs or len(call.outputs) != 1:
        return False
    before, after = call.inputs[0].shape, call.outputs[0].shape
    if len(before) != 4 or len(after) != 4 or before[:2] != after[:2]:
        return False
    if call.name != "avg_pool2d":
        return True
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    zeros = given.get("padding", 0) not in (0, (0,), (0, 0), [0], [0, 0]) and given.get("count_include_pad", True)
    return not zeros and given.get("divisor_override") is None


def flattens(call: Call) -> tuple[int, int] | None:
    """Height and width of the image if a call makes (B, C * height * width) of (B, C, height, width)."""
    if call.name not in _FLATTENING or not call.inputs or len(call.outputs) != 1:
        return None
    before, after = call.inputs[0].shape, call.outputs[0].shape
    if len(before) != 4 or after != (before[0], before[1] * before[2] * before[3]):
        return None
    return before[2], before[3]


def writes_out_features(call: Call) -> bool:
    """Whether a view or reshape says how many features there are, so that it would not fit other channels."""
    if call.name not in ("view", "reshape"):
        return False
    sizes = [*call.args[1:], *call.kwargs.values()]
    while sizes and isinstance(sizes[-1], (tuple, list)):
        sizes = list(sizes[-1])
    return not sizes or sizes[-1] != -1


def halves(call: Call, dim: int) -> list[tuple[Value, int]]:
    """The results of a call that are one half of what it reads along a dimension, each with which half it is.

    Of every other position, that is 2.
    """
    whole = call.inputs[0].shape
    parts = [value for value in call.outputs if value.shape[dim : dim + 1] == (whole[dim] / 2,)]
    if any(value.shape[:dim] + value.shape[dim + 1 :] != whole[:dim] + whole[dim + 1 :] for value in parts):
        return []
    if call.name in _SPLITTING and len(parts) == len(call.outputs) == 2:
        return list(zip(parts, (0, 1), strict=True))
    if call.name == "narrow" and parts:
        start = call.args[2] if len(call.args) > 2 else call.kwargs.get("start", 0)
        return [(parts[0], int(start > 0))]
    if call.name != "getitem" or not parts:
        return []
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    part = index[dim - len(whole)] if any(item is Ellipsis for item in index) else index[dim]
    if not isinstance(part, slice):
        return []
    start, _, step = part.indices(whole[dim])
    if step == 1 and start not in (0, whole[dim] // 2):
        return []
    return [(parts[0], 2 if step != 1 else int(start > 0))]


def describe(value: Value) -> str:
    """A value, for people."""
    if value.name:
        return f"the {value.origin} {value.name}"
    shape = "x".join(str(size) for size in value.shape)
    if value.call is not None:
        return f"the {shape} result of `{value.call.name}`"
    return f"an {value.origin} tensor of shape {shape}"


def activation_name(chain: Sequence[Call], frame: Frame | None) -> str:
    """What an activation is, for people: "gelu", "relu", "silu"."""
    names = [call.name for call in chain if call.name not in UNCHANGED and call.name not in DROPOUT]
    if len(names) == 1:
        limits = [*chain[0].args[1:], *chain[0].kwargs.values()][:2]
        return "relu6" if names[0] == "hardtanh" and limits == [0.0, 6.0] else names[0]
    if "erf" in names or ("tanh" in names and ("pow" in names or len(names) > 4)):
        return "gelu"
    if sorted(names) in (["mul", "sigmoid"], ["div", "add", "exp"]):
        return "silu"
    if sorted(names) == ["mul", "mul", "sigmoid"]:
        return "quick gelu"
    if names[:1] == ["relu"] and names[1:] in (["square"], ["pow"], ["mul"]):
        return "squared relu"
    if names == ["softplus", "tanh", "mul"]:
        return "mish"
    if frame is not None and frame.name:
        return type(frame.module).__name__.lower()
    telling = [name for name in names if name in ACTIVATIONS] or [
        name for name in names if name in NONLINEAR - COMPARISONS
    ]
    return (telling or names)[0]
