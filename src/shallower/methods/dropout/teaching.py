"""How far a narrow network's output is from what the full width teaches."""

from __future__ import annotations

from torch import Tensor

from shallower.training.divergence import kl_divergence


def divergence(output: Tensor, teacher: Tensor, categorical: bool) -> Tensor:
    """KL(teacher || output) of logits, mean over positions; else the squared error relative to the teacher's variance.

    Args:
        output: of the narrow network, (..., classes) or of any shape.
        teacher: of the full width, of the same shape.
        categorical: whether they are logits.
    """
    if categorical:
        return kl_divergence(output, teacher)
    output, teacher = output.float(), teacher.float()
    return (output - teacher).square().mean() / teacher.var().clamp_min(1e-12)
