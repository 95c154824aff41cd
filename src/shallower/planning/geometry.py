"""How kernels, strides and paddings of linear maps fit together."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from shallower.errors import PlanError
from shallower.sites import LinearMap


def not_foldable(m: LinearMap) -> str:
    """Why the identity is not one of the maps of this geometry, "" where it is."""
    if m.d_in != m.d_out or m.stride != (1, 1):
        return "the merged map changes the shape of its input"
    centred = all(k % 2 and 2 * p == d * (k - 1) for k, p, d in zip(m.kernel, m.padding, m.dilation, strict=True))
    if centred:
        return ""
    return "the merged kernel has no centre over its output (an odd kernel with padding of its half)"


def kernel_of(weight: Tensor) -> tuple[int, int]:
    """The kernel size of a weight; (1, 1) of a matrix."""
    if weight.dim() == 2:
        return 1, 1
    return weight.shape[2], weight.shape[3]


def fitted_map(producer: LinearMap, consumer: LinearMap, kernel: tuple[int, int], bias: bool = True) -> LinearMap:
    """One map with a kernel of any size in the place of two convolutions, so that the output keeps its size.

    A kernel of the size of the exact composition has its geometry. Any other has the stride s1 s2, no dilation and the
    padding p1 + s1 p2 - (K - k) / 2, with K = d1 (k1 - 1) + s1 d2 (k2 - 1) + 1.

    Raises:
        PlanError: no padding keeps the size.
    """
    exact = ungrouped_map(composed(producer, consumer, bias))
    if kernel == exact.kernel:
        return exact
    if exact.kind != "conv2d":
        raise PlanError(f"{consumer.name}: a linear layer has no kernel of {kernel[0]}x{kernel[1]}")
    padding = []
    for k, whole, dilation, p in zip(kernel, exact.kernel, exact.dilation, exact.padding, strict=True):
        extent = dilation * (whole - 1) + 1
        twice = 2 * p - extent + k
        if twice < 0 or twice % 2:
            raise PlanError(
                f"{consumer.name}: no padding lets a kernel of {kernel[0]}x{kernel[1]} give the size that "
                f"`{producer.name}` and `{consumer.name}` give"
            )
        padding.append(twice // 2)
    return replace(exact, kernel=kernel, dilation=(1, 1), padding=(padding[0], padding[1]))


def composed(producer: LinearMap, consumer: LinearMap, bias: bool, *, flattened: bool = False) -> LinearMap:
    """The one map that is `consumer` after `producer`, at the consumer's name.

    Two convolutions give a kernel of d1 (k1 - 1) + s1 d2 (k2 - 1) + 1 with stride s1 s2, padding p1 + s1 p2 and
    gcd(g1, g2) groups; where one of them has a single tap, the other's dilation stays instead. With `flattened`, a
    linear layer over all pixels of what a convolution gives becomes one over all pixels of what that reads.

    Raises:
        PlanError: one is a convolution and the other is not.
    """
    merged = resized_map(consumer, d_in=producer.d_in, bias=bias)
    if flattened:
        return replace(merged, d_in=producer.d_in * producer.size[0] * producer.size[1], size=producer.size)
    pointwise = producer.taps == 1 and is_plain(producer)
    if producer.kind == "conv2d" and consumer.kind != "conv2d" and pointwise:  # behind an average over all pixels
        return merged
    if (producer.kind == "conv2d") != (consumer.kind == "conv2d"):
        raise PlanError(f"{consumer.name}: a convolution and a linear layer do not merge into one")
    if producer.kind != "conv2d":
        if merged.size == producer.size:
            return merged
        return replace(merged, size=producer.size)
    rows, columns = _axis(producer, consumer, 0), _axis(producer, consumer, 1)
    return replace(
        merged,
        size=producer.size,
        kernel=(rows[0], columns[0]),
        dilation=(rows[1], columns[1]),
        stride=(producer.stride[0] * consumer.stride[0], producer.stride[1] * consumer.stride[1]),
        padding=joint_padding(producer.padding, producer.stride, consumer.padding),
        groups=math.gcd(producer.groups, consumer.groups),
    )


def joint_padding(inner: tuple[int, int], stride: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """The zeros that a convolution puts around its images where it also does so for the one behind it: p1 + s1 p2."""
    return inner[0] + stride[0] * outer[0], inner[1] + stride[1] * outer[1]


def _axis(producer: LinearMap, consumer: LinearMap, i: int) -> tuple[int, int]:
    """Kernel size and dilation along one axis of two convolutions in a row."""
    k1, d1, k2 = producer.kernel[i], producer.dilation[i], consumer.kernel[i]
    d2 = producer.stride[i] * consumer.dilation[i]
    if k1 == 1 and k2 == 1:
        return 1, 1
    if k1 == 1:
        return k2, d2
    if k2 == 1:
        return k1, d1
    return d1 * (k1 - 1) + d2 * (k2 - 1) + 1, 1


def is_plain(m: LinearMap) -> bool:
    return m.stride == (1, 1) and m.padding == (0, 0)


def geometry(m: LinearMap) -> tuple[tuple[int, int], ...]:
    return m.kernel, m.stride, m.padding, m.dilation


def same_stride(consumers: tuple[LinearMap, ...]) -> bool:
    return len({c.stride for c in consumers}) == 1


def resized_map(
    m: LinearMap, *, d_in: int | None = None, d_out: int | None = None, bias: bool | None = None
) -> LinearMap:
    """A map with other sizes; Transformers' `Conv1D` always has a bias."""
    if d_in is None:
        d_in = m.d_in
    if d_out is None:
        d_out = m.d_out
    if bias is None:
        bias = m.bias
    bias = m.kind == "conv1d" or bias
    if (d_in, d_out, bias) == (m.d_in, m.d_out, m.bias):
        return m
    return replace(m, d_in=d_in, d_out=d_out, bias=bias)


def ungrouped_map(m: LinearMap) -> LinearMap:
    """A map with every output made of every input."""
    if m.groups == 1:
        return m
    return replace(m, groups=1)
