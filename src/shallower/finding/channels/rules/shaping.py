"""The same elements in another shape or another order of axes, repeated, or turned round.

x.view(batch, heads, -1)    # an axis divided: heads, and what is in them
x.transpose(1, 2)
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Run, close, fixed, reshaped, within
from shallower.finding.channels.rules.arguments import dimensions, given, integer, integers
from shallower.recording.tracing import Call


@rule("view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d")
def another_shape(f: Following, call: Call) -> Axes:
    """The same elements in another shape, or in that of another tensor; view(dtype) gives others."""
    source, result = call.inputs[0], call.outputs[0]
    if source.elements != result.elements:
        raise UnknownUseError
    axes = reshaped(f.axes(source), result.shape)
    if call.name.endswith("_as"):
        axes = f.broadcast(axes, f.axes(call.inputs[-1]))
    return axes


@rule("permute")
def permuted(f: Following, call: Call) -> Axes:
    """Axes in another order."""
    axes = f.axes(call.inputs[0])
    return [axes[dim] for dim in dimensions(call, len(axes))]


@rule("transpose swapaxes swapdims t get.T get.mT get.H get.mH adjoint")
def transposed(f: Following, call: Call) -> Axes:
    """Two axes change places."""
    axes = f.axes(call.inputs[0])
    first, second = -2, -1
    if call.name in ("transpose", "swapaxes", "swapdims"):
        first = integers(given(call, 1, "dim0", "axis0"))[0]
        second = integers(given(call, 2, "dim1", "axis1"))[0]
    elif call.name in ("get.T", "get.H", "t") and len(axes) > 2:
        return axes[::-1]
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("movedim moveaxis")
def carried(f: Following, call: Call) -> Axes:
    """Axes go to other places, the rest closes up."""
    axes = f.axes(call.inputs[0])
    count = len(axes)
    origin = [dim % count for dim in integers(given(call, 1, "source"))]
    goal = [dim % count for dim in integers(given(call, 2, "destination"))]
    rest = [dim for dim in range(count) if dim not in origin]
    placed = dict(zip(goal, origin, strict=True))
    return [axes[placed[i] if i in placed else rest.pop(0)] for i in range(count)]


# ------------------------------------------------------------------------------------------------- repetition

REPEATED = "repetitions of channels"


@rule("expand broadcast_to")
def expanded(f: Following, call: Call) -> Axes:
    """Axes of one position are repeated: what stands there is alike, however often."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    found: Axes = [Run(size) for size in shape]
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        if axis.size > 1 or shape[i] == 1:
            found[i] = axis
    return found


@rule("expand_as")
def expanded_as(f: Following, call: Call) -> Axes:
    """Repeated as another tensor has positions."""
    return f.tied(call.inputs)


@rule("broadcast_tensors")
def broadcast(f: Following, call: Call) -> list[Axes]:
    """Several tensors in one shape."""
    axes = f.tied(call.inputs)
    return [list(axes) for _ in call.outputs]


@rule("repeat tile")
def repeated(f: Following, call: Call) -> Axes:
    """The whole tensor several times along an axis."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    found: Axes = [Run(size) for size in shape]
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        if axis.size > 1:
            found[i] = within([Run(shape[i] // axis.size), axis])
    return found


@rule("repeat_interleave")
def interleaved(f: Following, call: Call) -> Axes:
    """Each position several times, side by side."""
    axes = f.axes(call.inputs[0])
    repeats, dim = integer(call, 1, "repeats"), integer(call, 2, "dim")
    if axes[dim].size == 1:
        axes[dim] = Run(repeats)
    else:
        axes[dim] = within([axes[dim], fixed(repeats, REPEATED)])
    return axes


# ------------------------------------------------------------------------------------------------- other orders


@rule("flip fliplr flipud roll rot90")
def turned(f: Following, call: Call) -> Axes:
    """Positions of some axes change places: those stay as they are, the others pass."""
    axes = f.axes(call.inputs[0])
    dims = {"fliplr": [1], "flipud": [0]}.get(call.name)
    if call.name == "rot90":
        dims = integers(given(call, 2, "dims") or [0, 1])
    elif dims is None:
        dims = dimensions(call, len(axes), 2 if call.name == "roll" else 1)
    for dim in dims:
        close(axes[dim], f"{f.title(call)} moves its positions")
    if call.name == "rot90" and integer(call, 1, "k", 1) % 2:
        axes[dims[0]], axes[dims[1]] = axes[dims[1]], axes[dims[0]]
    return axes


@rule("tril triu")
def triangle(f: Following, call: Call) -> Axes:
    """Zeros on one side of the diagonal of the last two axes."""
    axes = f.axes(call.inputs[0])
    for axis in axes[-2:]:
        close(axis, f"{f.title(call)} looks at the places of its positions")
    return axes


@rule("as_strided")
def strided(f: Following, call: Call) -> Axes:
    """Elements by their place in memory."""
    raise UnknownUseError(f"{f.title(call)} reads it by its place in memory")
