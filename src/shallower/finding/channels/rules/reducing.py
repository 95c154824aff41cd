"""Operations over an axis: sums, averages, extremes, softmax.

x.mean((2, 3))              # pixels go, channels pass
x.softmax(-1)               # the positions of the last axis stay, all others pass
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import ONE, close, fixed
from shallower.finding.channels.rules.arguments import dimensions, given, integer, integers
from shallower.recording.tracing import Call

COMPARES = "compares its channels with each other"


def without(call: Call, axes: Axes, dims: list[int]) -> list[Axes]:
    """The axes that are left, each where it was where the result has as many."""
    kept = len(call.outputs[0].shape) == len(axes)
    found: Axes = []
    for i, axis in enumerate(axes):
        if i not in dims:
            found.append(axis)
        elif kept:
            found.append(fixed(1, ONE))
    return [list(found) for _ in call.outputs]


@rule("sum nansum count_nonzero")
def summed(f: Following, call: Call) -> list[Axes]:
    """Zeros add nothing, so that a channel may be left out of a sum."""
    axes = f.axes(call.inputs[0])
    dims = dimensions(call, len(axes))
    for dim in dims:
        f.contracted.append((axes[dim], call))
    return without(call, axes, dims)


@rule("mean var std var_mean std_mean nanmean amax amin aminmax logsumexp prod any all median nanmedian")
def averaged(f: Following, call: Call) -> list[Axes]:
    """An average over channels is another one over fewer, and so is an extreme."""
    axes = f.axes(call.inputs[0])
    dims = dimensions(call, len(axes))
    for dim in dims:
        f.mark(axes[dim], "averaged")
    return without(call, axes, dims)


@rule("mse_loss l1_loss smooth_l1_loss huber_loss")
def loss(f: Following, call: Call) -> Axes:
    """How far two tensors are apart at each place, on average."""
    old = (given(call, 2, "size_average"), given(call, 3, "reduce"))
    if len(call.inputs) != 2 or (call.name != "huber_loss" and old != (None, None)):
        raise UnknownUseError
    axes = f.tied(call.inputs)
    reduction = given(call, 2 if call.name == "huber_loss" else 4, "reduction")
    if reduction == "none":
        return axes
    if reduction not in (None, "mean"):
        raise UnknownUseError
    for axis in axes:
        f.mark(axis, "averaged")
    return []


@rule("norm vector_norm linalg_vector_norm linalg_norm norm_except_dim")
def length(f: Following, call: Call) -> list[Axes]:
    """Zeros add nothing to a length."""
    axes = f.axes(call.inputs[0])
    if given(call, 1, "p", "ord") not in (None, 1, 2, 1.0, 2.0, "fro") or call.name == "norm_except_dim":
        raise UnknownUseError
    dims = dimensions(call, len(axes), 2)
    return without(call, axes, dims)


@rule("min argmin mode kthvalue")
def extreme(f: Following, call: Call) -> Axes | list[Axes]:
    """Two tensors elementwise, or the extreme of an axis, which a zero may be."""
    if len(call.inputs) == 2:
        return f.tied(call.inputs)
    axes = f.axes(call.inputs[0])
    dims = dimensions(call, len(axes), 2 if call.name == "kthvalue" else 1)
    for dim in dims:
        close(axes[dim], f"{f.title(call)} {COMPARES}")
    return without(call, axes, dims)


@rule("softmin gumbel_softmax cumprod argsort logcumsumexp cummax cummin")
def along(f: Following, call: Call) -> list[Axes]:
    """Positions of one axis depend on each other: it stays as it is, the others pass."""
    axes = f.axes(call.inputs[0])
    place = 4 if call.name == "gumbel_softmax" else 1
    dim = given(call, place, "dim")
    if dim is None:
        dim = usual_axis(call, len(axes))
    (dim,) = integers(dim)
    close(axes[dim], f"{f.title(call)} {COMPARES}")
    return [list(axes) for _ in call.outputs]


def usual_axis(call: Call, count: int) -> int:
    """The dimension that is meant where a call gives none."""
    if call.name in ("softmax", "log_softmax", "softmin"):
        return 0 if count in (0, 1, 3) else 1
    return -1


@rule("diff")
def differences(f: Following, call: Call) -> Axes:
    """Neighbours on an axis."""
    axes = f.axes(call.inputs[0])
    dim = integer(call, 2, "dim", -1)
    close(axes[dim], f"{f.title(call)} subtracts neighbours")
    axes[dim] = fixed(call.outputs[0].shape[dim], "differences")
    return axes


@rule(
    """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
    fft_rfftn fft_irfftn fft_fftshift fft_ifftshift
    """
)
def frequencies(f: Following, call: Call) -> Axes:
    """Positions of some axes become frequencies: those stay as they are, the others pass."""
    axes = f.axes(call.inputs[0])
    dims = given(call, 1 if call.name.endswith("shift") else 2, "dim")
    if dims is None:
        count = 1
        if call.name.endswith(("n", "shift")):
            count = len(axes)
        elif call.name.endswith("2"):
            count = 2
        dims = list(range(len(axes)))[-count:]
    for dim in integers(dims):
        close(axes[dim], f"{f.title(call)} mixes positions by frequency")
        axes[dim] = fixed(call.outputs[0].shape[dim], "frequencies")
    return axes
