"""How much a change to a model changes what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shallower.core.inputs import tensors
from shallower.errors import SiteError


def output_change(reference: Any, output: Any) -> Tensor:
    """How far a model's output is from a reference, 0 where they are equal; a scalar.

    Logits (an output with a `logits` entry): the Kullback-Leibler divergence of the output's distribution from the
    reference's, mean over rows. Otherwise the relative squared error over all floating tensors of the output.

    Raises:
        SiteError: the output holds no floating tensor.
    """
    logits, changed = _logits(reference), _logits(output)
    if logits is not None and changed is not None:
        expected = logits.double().log_softmax(-1)
        return (expected.exp() * (expected - changed.double().log_softmax(-1))).sum(-1).mean()
    pairs = [
        (a.double(), b.double())
        for a, b in zip(tensors(reference), tensors(output), strict=True)
        if a.is_floating_point()
    ]
    if not pairs:
        raise SiteError("the model's output holds no floating tensor, so its change cannot be measured; give score=")
    error = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    size = torch.stack([a.square().sum() for a, _ in pairs]).sum()
    return error / size.clamp_min(torch.finfo(torch.float64).tiny)


def _logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None
