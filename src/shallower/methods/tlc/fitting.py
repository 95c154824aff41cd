"""Two linear layers in a row, replaced by one fitted kernel or by a narrower pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Gram
from shallower.calibrating.patches import flat, patches
from shallower.core.algebra import response, wide
from shallower.errors import FitError
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.fits import Fit
from shallower.sites import LinearMap

_MOST_ELEMENTS = 1 << 24
"""Numbers in the patches that are held at a time."""


@torch.no_grad()
def patch_gram(m: LinearMap, x: Tensor, y: Tensor) -> Gram:
    """Second moments of a convolution's input patches and of the outputs that it is to give.

        gram = patch_gram(m, x, conv2(conv1(x))) + patch_gram(m, x2, conv2(conv1(x2)))
        weight, bias = fitted_kernel(m, gram)

    Args:
        m: the convolution to be fitted; its geometry counts.
        x: images (n, d_in, h, w).
        y: the outputs (n, d_out, h', w').
    """
    gram = Gram(m.d_in * m.taps, m.d_out, device=wide(x[:0]).device)
    size = max(1, _MOST_ELEMENTS // max(1, m.d_in * m.taps * y.shape[2] * y.shape[3]))
    for images, outputs in zip(torch.split(x, size), torch.split(y, size), strict=True):
        gram = gram.seen(patches(images, m), flat(outputs, True))
    return gram


def fitted_kernel(m: LinearMap, gram: Gram, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The kernel (d_out, d_in, kh, kw) and the bias (d_out,) with the least squared error, float64.

        weight, bias = fitted_kernel(m, gram)

    Args:
        m: the convolution.
        gram: what `patch_gram` returns, of several batches added up.
        ridge: added to the diagonal of the centred second moments, relative to its mean.

    Raises:
        FitError: too little was seen, or it is not finite.
    """
    try:
        moments = gram.centred()
        weight = moments.fit(ridge)
    except FitError as error:
        raise FitError(f"{m.name}: {error}") from error
    bias = moments.mean_y - weight @ moments.mean_z
    return weight.reshape(m.d_out, m.d_in, *m.kernel).contiguous(), bias


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
