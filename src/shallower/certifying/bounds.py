"""What a count and a mean over independent rows say about all rows that are to come.

changed_at_most(0, 100)                 # 0.0295: the "rule of three"
ratio_over_rows(losses, counts)         # Estimate(value=..., low=..., high=...)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shallower.certifying.certificate import LEVEL, Estimate

_RESAMPLES = 1000
_BISECTIONS = 60
"""Of an interval of length 1: below the spacing of floats."""


def changed_at_most(changed: int, rows: int, level: float = LEVEL) -> float:
    """The one-sided Clopper-Pearson bound: the largest rate at which so few changes are still as likely as 1 - level.

        changed_at_most(0, 100)             # 0.0295

    Args:
        changed: how many of the rows.
        rows: independent of one another.
        level: how often the bound holds, at least.

    Reference: Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
    1934.
    """
    if changed >= rows:
        return 1.0
    counts = torch.arange(changed + 1, dtype=torch.float64)
    others = rows - counts
    ways = math.lgamma(rows + 1) - torch.lgamma(counts + 1) - torch.lgamma(others + 1)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        rate = (low + high) / 2
        # log P(X <= changed) for X of the binomial distribution
        likely = torch.logsumexp(ways + counts * math.log(rate) + others * math.log1p(-rate), 0)
        if float(likely) > math.log(1 - level):
            low = rate
        else:
            high = rate
    return high


def ratio_over_rows(parts: Tensor, wholes: Tensor, seed: int = 0) -> Estimate:
    """sum parts / sum wholes, with the interval that a bootstrap over rows gives.

        ratio_over_rows(changed_tokens, tokens)

    Args:
        parts, wholes: one number a row, (rows,) float64.
        seed: of the rows that are drawn.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (percentiles).
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(_RESAMPLES, dtype=torch.float64)
    for index in range(_RESAMPLES):
        drawn = torch.randint(len(parts), (len(parts),), generator=generator)
        found[index] = _ratio(parts[drawn], wholes[drawn])
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(float(_ratio(parts, wholes)), low, high)


def _ratio(parts: Tensor, wholes: Tensor) -> Tensor:
    """0 where there is nothing of anything."""
    return parts.sum() / wholes.sum().clamp_min(torch.finfo(torch.float64).tiny)
