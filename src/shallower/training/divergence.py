"""How far the output of a network is from another's, as a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(given: Tensor, wanted: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean over positions of KL(p || q) = sum p log(p / q), p and q the distributions of the logits wanted and given.

        loss = kl_divergence(student(x), teacher(x))

    Args:
        given, wanted: logits (..., classes); computed in float32 at least.
        mask: of the positions that count, with the first dimensions of the logits; one of another shape is ignored.
        temperature: the logits are divided by it, the result is multiplied by its square, as Hinton et al. do.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    return counted(kl_at_positions(given, wanted, temperature), mask).mean()


def kl_at_positions(given: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """The same at each position, of the shape of the logits without their last dimension.

    each = kl_at_positions(student(x), teacher(x))
    """
    p, q = ((_wide(logits) / temperature).log_softmax(-1) for logits in (wanted, given))
    # a class that is impossible to both (-inf) adds nothing
    terms = torch.where(p.isneginf() & q.isneginf(), 0.0, p.exp() * (p - q))
    each: Tensor = terms.sum(-1) * temperature**2
    return each


def relative_divergence(given: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum (given - wanted)^2 / sum wanted^2 over the positions that the mask counts; 0 where both are equal."""
    a, b = counted(_wide(given), mask), counted(_wide(wanted), mask)
    error: Tensor = (a - b).square().sum() / b.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return error


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, where the mask has the first dimensions of `values`."""
    if mask is None or values.shape[: mask.dim()] != mask.shape:
        return values
    return values[mask.to(values.device).bool()]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
