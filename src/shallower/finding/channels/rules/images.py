"""Operations on images: pooling, edges, pixels from channels and channels from pixels.

F.max_pool2d(x, 2)          # each channel by itself
F.pixel_shuffle(x, 2)       # (C 4, H, W) -> (C, 2 H, 2 W)
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Run, cat, close, divide, fixed, is_open, tie, within
from shallower.finding.channels.rules.arguments import given, integer, of_axis, tensor
from shallower.recording.tracing import Call


def pixels(f: Following, call: Call, sizes: tuple[int, ...]) -> Axes:
    """Axes of pixels that an operation gives."""
    return [fixed(size, f"{f.title(call)} takes it for pixels") for size in sizes]


def close_pixels(f: Following, call: Call, axes: Axes) -> None:
    """Axes of pixels that an operation reads."""
    for axis in axes:
        close(axis, f"{f.title(call)} takes it for pixels")


@rule(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
    interpolate upsample upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    max_unpool1d max_unpool2d max_unpool3d
    """
)
def pooled(f: Following, call: Call) -> list[Axes]:
    """Each channel of an image by itself."""
    axes = f.tied(call.inputs)
    dims = len(axes) - 2
    for count in (1, 2, 3):
        if f"{count}d" in call.name:
            dims = count
    batch = axes[: len(axes) - dims]
    found: list[Axes] = []
    for value in call.outputs:
        found.append([*batch, *pixels(f, call, value.shape[len(batch) :])])
    for i, axis in enumerate(axes[len(axes) - dims :], len(batch)):
        if _looks_at_each(call, i - len(batch)) or (_resizes(call) and call.outputs[0].shape[i] == axis.size):
            for made in found:
                made[i] = axis
        else:
            close_pixels(f, call, [axis])
    return found


def _resizes(call: Call) -> bool:
    """Whether a call gives an axis as it is where that keeps its size."""
    return call.name in ("interpolate", "upsample") and given(call, 1, "size") is not None


def _looks_at_each(call: Call, axis: int) -> bool:
    """Whether a pooling looks at each position of an axis by itself: the second of a kernel of (2, 1)."""
    if "adaptive" in call.name or not call.name.startswith(("max_pool", "avg_pool")):
        return False
    kernel, padding = given(call, 1, "kernel_size"), given(call, 3, "padding")
    stride = given(call, 2, "stride") or kernel
    return (of_axis(kernel, axis, 0), of_axis(stride, axis, 1), of_axis(padding, axis, 0)) == (1, 1, 0)


@rule("grid_sample grid_sampler")
def sampled(f: Following, call: Call) -> Axes:
    """Pixels (B, C, H, W) at places (B, h, w, 2)."""
    axes, grid = f.axes(tensor(call, 0, "input")), f.axes(tensor(call, 1, "grid"))
    tie(axes[0], grid[0])
    close_pixels(f, call, [*axes[2:], grid[-1]])
    return [*axes[:2], *grid[1:-1]]


@rule("affine_grid")
def grid(f: Following, call: Call) -> Axes:
    """Places of pixels."""
    close_pixels(f, call, f.axes(call.inputs[0]))
    return pixels(f, call, call.outputs[0].shape)


@rule("pad")
def padded(f: Following, call: Call) -> Axes:
    """Numbers around some axes; around channels they are channels of their own."""
    axes = f.axes(tensor(call, 0, "input"))
    sizes = list(given(call, 1, "pad"))
    zeros = given(call, 2, "mode") in (None, "constant")
    for i, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True), 1):
        axis = axes[-i]
        known = isinstance(before, int) and isinstance(after, int)
        if known and not before and not after:
            continue
        if is_open(axis) and zeros and known and min(before, after) >= 0:
            axes[-i] = cat([Run(before), axis, Run(after)])
        else:
            close(axis, f"{f.title(call)} repeats or cuts its edge")
            axes[-i] = fixed(call.outputs[0].shape[-i], f"{f.title(call)} repeats or cuts its edge")
    return axes


@rule("pixel_shuffle")
def pixels_from_channels(f: Following, call: Call) -> Axes:
    """(C r r, H, W) -> (C, H r, W r)."""
    r = integer(call, 1, "upscale_factor")
    *batch, channels, height, width = f.axes(tensor(call, 0, "input"))
    kept, made = divide(channels, channels.size // (r * r), r * r)
    close_pixels(f, call, [made, height, width])
    return [*batch, kept, *pixels(f, call, call.outputs[0].shape[-2:])]


@rule("pixel_unshuffle")
def channels_from_pixels(f: Following, call: Call) -> Axes:
    """(C, H r, W r) -> (C r r, H, W)."""
    r = integer(call, 1, "downscale_factor")
    *batch, channels, height, width = f.axes(tensor(call, 0, "input"))
    close_pixels(f, call, [height, width])
    return [*batch, within([channels, *pixels(f, call, (r * r,))]), *pixels(f, call, call.outputs[0].shape[-2:])]


@rule("channel_shuffle native_channel_shuffle")
def shuffled(f: Following, call: Call) -> Axes:
    """(g, n) channels -> (n, g)."""
    axes, groups = f.axes(tensor(call, 0, "input")), integer(call, 1, "groups")
    outer, inner = divide(axes[1], groups, axes[1].size // groups)
    close(outer, f"{f.title(call)} has a number of groups that does not follow")
    axes[1] = within([inner, outer])
    return axes


@rule("unfold im2col")
def unfolded(f: Following, call: Call) -> Axes:
    """Patches of an image as columns (B, C k k, L); or, of a tensor, stretches along an axis."""
    axes, shape = f.axes(call.inputs[0]), call.outputs[0].shape
    if len(shape) == len(axes) + 1:
        dim = integer(call, 1, "dimension") % len(axes)
        close(axes[dim], f"{f.title(call)} takes stretches of it")
        axes[dim] = fixed(shape[dim], f"{f.title(call)} takes stretches of it")
        return [*axes, fixed(shape[-1], f"{f.title(call)} takes stretches of it")]
    if len(axes) < 3 or len(shape) != len(axes) - 1:
        raise UnknownUseError
    *batch, channels, height, width = axes
    close_pixels(f, call, [height, width])
    taps = fixed(shape[-2] // channels.size, "taps")
    return [*batch, within([channels, taps]), fixed(shape[-1], "patches")]


@rule("fold col2im")
def folded(f: Following, call: Call) -> Axes:
    """Patches as columns (B, C k k, L) -> an image."""
    *batch, columns, places = f.axes(call.inputs[0])
    channels = call.outputs[0].shape[-3]
    kept, taps = divide(columns, channels, columns.size // channels)
    close(taps, "taps of a patch")
    close(places, "patches")
    return [*batch, kept, *pixels(f, call, call.outputs[0].shape[-2:])]


# ------------------------------------------------------------------------------------------------- of detectors


@rule("roi_align roi_pool")
def regions(f: Following, call: Call) -> list[Axes]:
    """Images (N, C, H, W) at boxes (K, 5), or a list of (k, 4) for each image -> (K, C, h, w)."""
    batch, channels, height, width = f.axes(tensor(call, 0, "input"))
    for value in call.inputs[1:]:
        f.close_axes(value, "boxes")
    close_pixels(f, call, [batch, height, width])
    found: list[Axes] = []
    for value in call.outputs:
        found.append([fixed(value.shape[0], "boxes"), channels, *pixels(f, call, value.shape[2:])])
    return found


@rule("deform_conv2d")
def deformed_convolution(f: Following, call: Call) -> Axes:
    """A convolution whose taps lie at places (N, 2 taps, H, W), each weighted."""
    axes, (rows, columns, *taps) = f.axes(tensor(call, 0, "input")), f.axes(tensor(call, 1, "weight"))
    if columns.size != axes[1].size:
        raise UnknownUseError(f"{f.title(call)} has groups, which are not followed")
    close_pixels(f, call, [*taps, *axes[2:]])
    f.contract(call, axes[1], columns)
    for value in call.inputs[2:]:
        own = f.axes(value)
        if len(own) == 1:
            tie(rows, own[0])
        else:
            tie(axes[0], own[0])
            for axis in own[1:]:
                close(axis, "places of taps")
    f.written.append((rows, call))
    return [axes[0], rows, *pixels(f, call, call.outputs[0].shape[2:])]
