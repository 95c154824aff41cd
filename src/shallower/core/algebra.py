"""Linear algebra of linear maps: pure functions of tensors, no modules.

Weights are in logical orientation: (d_out, d_in) for a linear layer, (d_out, d_in, kh, kw) for a convolution. Nothing
here chooses a precision; callers pass float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def norm_as_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as scale and shift: norm(x) = scale x + shift.

    Args:
        mean, var: (n,) running statistics.
        weight, bias: (n,) gamma and beta, None for 1 and 0.
        eps: added to the variance.

    Returns:
        scale (n,) and shift (n,), float64.
    """
    # norm(x) = gamma (x - mean) / sqrt(var + eps) + beta
    scale = (wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * wide(weight)
    shift = -wide(mean) * scale
    if bias is not None:
        shift = shift + wide(bias)
    return scale, shift


def scale_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """diag(scale) W: every output channel times its scale."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def response(weight: Tensor, constant: Tensor) -> Tensor:
    """What a map without bias answers to a constant input (d_in,): (d_out,). Of a convolution, away from the border."""
    if weight.dim() > 2:
        weight = weight.flatten(2).sum(2)
    return weight @ constant


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The dense (d_out, d_in, kh, kw) weight of a grouped convolution's (d_out, d_in / groups, kh, kw)."""
    if groups == 1:
        return weight
    d_out, width = weight.shape[:2]
    dense = weight.new_zeros(d_out, width * groups, *weight.shape[2:])
    rows = d_out // groups
    for g in range(groups):
        dense[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = weight[g * rows : (g + 1) * rows]
    return dense


def grouped(weight: Tensor, groups: int) -> Tensor:
    """The (d_out, d_in / groups, kh, kw) weight of a grouped convolution: the diagonal blocks of a dense one."""
    if groups == 1:
        return weight
    rows, columns = weight.shape[0] // groups, weight.shape[1] // groups
    blocks = [weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    return torch.cat(blocks)


def with_skip(weight: Tensor) -> Tensor:
    """W + I: the map that adds its input to what it gives; in a convolution the identity stands in the kernel's centre.

    Args:
        weight: (d, d), or (d, d, kh, kw) with odd kh and kw.
    """
    added = weight.clone()
    centre = added
    if weight.dim() != 2:
        centre = added[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
    centre.diagonal().add_(1)
    return added


def compose(
    outer: Tensor,
    inner: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    inner_dilation: tuple[int, int] = (1, 1),
    outer_dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """The weight of the one map that does `inner` and then `outer`.

        y = compose(C, P) @ x           # equals C @ (P @ x)

    Args:
        outer: (d_out, m) or (d_out, m, k2, k2).
        inner: (m, d_in) or (m, d_in, k1, k1).
        stride: of the inner convolution.
        inner_dilation, outer_dilation: of the convolutions.

    Returns:
        (d_out, d_in), or (d_out, d_in, k, k) with k = d1 (k1 - 1) + stride d2 (k2 - 1) + 1. Along an axis where one of
        the two kernels has a single tap, k is the other's size, to be used with the dilation stride d2 or d1.
    """
    if outer.dim() == 2:
        return outer @ inner
    steps, sizes = [], []
    for axis in (0, 1):
        k1, k2 = inner.shape[2 + axis], outer.shape[2 + axis]
        d1, d2 = inner_dilation[axis], stride[axis] * outer_dilation[axis]
        if k1 == 1 or k2 == 1:
            d1 = d2 = 1
        steps.append((d1, d2))
        sizes.append(d1 * (k1 - 1) + d2 * (k2 - 1) + 1)
    # tap b of the outer kernel, which reads tap a of the inner one, stands at d1 a + d2 b
    result = outer.new_zeros(outer.shape[0], inner.shape[1], *sizes)
    for b0 in range(outer.shape[2]):
        for b1 in range(outer.shape[3]):
            for a0 in range(inner.shape[2]):
                for a1 in range(inner.shape[3]):
                    row = steps[0][0] * a0 + steps[0][1] * b0
                    column = steps[1][0] * a1 + steps[1][1] * b1
                    result[:, :, row, column] += outer[:, :, b0, b1] @ inner[:, :, a0, a1]
    return result


def unrolled(
    outer: Tensor,
    inner: Tensor,
    size: tuple[int, int],
    result: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """The linear layer that does a zero-padded convolution of an image and then a linear layer over all its pixels.

        y = unrolled(C, P, (8, 8), (6, 6)) @ picture.flatten()      # equals C @ F.conv2d(picture, P).flatten()

    Args:
        outer: (d_out, m * h * w).
        inner: (m, d_in, kh, kw).
        size: height and width of the image that the convolution reads.
        result: height h and width w of the image that it gives.
        stride, padding, dilation: of the convolution.

    Returns:
        (d_out, d_in * height * width).
    """
    shape = (outer.shape[0], inner.shape[1], *size)
    if inner.shape[0] == 0:
        return outer.new_zeros(shape).flatten(1)
    # a row of the product is the gradient of one output of the linear layer by the image, a transposed convolution
    pictures = outer.reshape(outer.shape[0], -1, *result)
    weight: Tensor = conv2d_input(shape, inner, pictures, stride, padding, dilation)  # type: ignore[no-untyped-call]
    return weight.flatten(1)
