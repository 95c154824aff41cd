"""How far a narrow network's output is from what the full width teaches."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(output: Tensor, teacher: Tensor, categorical: bool) -> Tensor:
    """KL(teacher || output) of logits, mean over positions; else the squared error relative to the variance."""
    output, teacher = output.float(), teacher.float()
    if not categorical:
        return (output - teacher).square().mean() / teacher.var().clamp_min(1e-12)
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(output, -1)
    return F.kl_div(log_q.flatten(0, -2), log_p.flatten(0, -2), reduction="batchmean", log_target=True)
