"""Two linear layers in a row, replaced by one fitted kernel or by a narrower pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.algebra import response, wide
from shallower.errors import MethodError
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.fits import Fit
from shallower.sites import LinearMap

_MOST_ELEMENTS = 1 << 24
"""Numbers in the patches that are held at a time."""


class PatchGram:
    """Second moments of a convolution's input patches and of the outputs it is to give; batches add up.

        gram = PatchGram(fitted_map(conv1, conv2, (3, 3)))
        gram.add(x, conv2(conv1(x)))
        weight, bias = gram.solve()

    Memory is O((d_in kh kw)^2), whatever the data.

    Args:
        m: the convolution to be fitted; its geometry counts.
    """

    def __init__(self, m: LinearMap) -> None:
        self.map = m
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add images x (n, d_in, h, w) and the outputs y (n, d_out, h', w') that they are to give."""
        m = self.map
        size = max(1, _MOST_ELEMENTS // max(1, m.d_in * m.taps * y.shape[2] * y.shape[3]))
        for images, outputs in zip(torch.split(x, size), torch.split(y, size), strict=True):
            patches = F.unfold(images, m.kernel, m.dilation, m.padding, m.stride).transpose(1, 2).flatten(0, 1)
            rows = wide(torch.cat([patches, patches.new_ones(len(patches), 1)], 1))
            self.xx = self.xx + rows.T @ rows
            self.xy = self.xy + rows.T @ wide(outputs.flatten(2).transpose(1, 2).flatten(0, 1))

    def solve(self, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The kernel (d_out, d_in, kh, kw) and the bias (d_out,) with the least squared error, float64.

        Args:
            ridge: added to the diagonal of the Gram matrix, relative to its mean.

        Raises:
            MethodError: nothing was added, or it is not finite.
        """
        xx, xy = torch.as_tensor(self.xx), torch.as_tensor(self.xy)
        if xx.dim() == 0 or not bool(xx.isfinite().all()) or not bool(xy.isfinite().all()):
            raise MethodError(f"{self.map.name}: there is no finite data to fit a kernel on")
        # (X^T X + l I) W = X^T Y; the last column of X is the bias's ones
        damped = xx + ridge * xx.diagonal()[:-1].mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        solution = torch.linalg.solve(damped, xy).T
        weight = solution[:, :-1].reshape(self.map.d_out, self.map.d_in, *self.map.kernel)
        return weight.contiguous(), solution[:, -1].contiguous()


def narrowed_pair(first: nn.Module, second: nn.Module, moments: Tensor, mean: Tensor, rank: int) -> Fit:
    """Two linear layers in a row with fewer channels between them, which give nearly the same output.

        fit = narrowed_pair(conv1, conv2, moments, mean, rank=16)

    Of the directions of z, the second layer's input, those are kept that carry most of its output: the leading right
    singular vectors of W E[z z^T]^(1/2), where W stacks the taps of the kernel. The others are replaced by their mean.

    Args:
        first: the first layer, with nothing between it and the second.
        second: the second layer.
        moments: (m, m) E[z z^T], float64.
        mean: (m,) E[z].
        rank: channels that remain.

    Returns:
        The fit of an entry that becomes a pair.

    Reference: Izenman, Reduced-rank regression for the multivariate linear model, 1975, theorem 1.
    """
    rows, columns = wide(weight_of(first)), wide(weight_of(second))
    taps = columns
    if columns.dim() > 2:
        taps = columns.flatten(2).transpose(1, 2).flatten(0, 1)  # (d_out taps, m)
    # E[z z^T]^(1/2) = V S, without the directions in which z does not vary
    values, vectors = torch.linalg.eigh(moments)
    roots = values.clamp_min(0).sqrt()
    kept = roots > 1e-7 * roots.max()
    vectors, roots = vectors[:, kept], roots[kept]
    _, _, directions = torch.linalg.svd(taps @ (vectors * roots), full_matrices=False)
    directions = directions[:rank]
    down = directions @ (vectors / roots).T  # (rank, m)
    back = (vectors * roots) @ directions.T  # (m, rank)

    narrow = (down @ rows.flatten(1)).reshape(-1, *rows.shape[1:])
    up = torch.einsum("om...,mr->or...", columns, back)
    lost = response(columns, mean - back @ (down @ mean))
    inner, outer = bias_of(first), bias_of(second)
    shift = None if inner is None else down @ wide(inner)
    bias = lost if outer is None else wide(outer) + lost
    return Fit((), (bias,), narrow, (up,), shift)
