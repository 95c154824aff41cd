"""Which channels are missed least by all that reads them together, from the second moments of each reader.

parts = [Part.of(moments.zz, weight, metric, ridge=1e-4, columns=columns), ...]
elimination = eliminate_jointly(parts)
kept = elimination.kept(24)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shallower.calibrating.metrics import Metric
from shallower.calibrating.selection import Elimination, factor, ridged
from shallower.errors import FitError

_MOST_STEPS = 256
"""Steps of an elimination, about, where there are more channels: several go at a time."""


@dataclass(frozen=True)
class Part:
    """One reader of the channels.

    Attributes:
        p: (N, N) float64, the inverse of the ridged second moments of its N columns.
        s: (N, N) float64, the weighted products of the rows of the fit.
        columns: (n, t) int64, the columns that each of the n channels has; other columns stay.
        whole: what the columns explain of the reader's output, in the same units as errors.
    """

    p: Tensor
    s: Tensor
    columns: Tensor
    whole: float

    @classmethod
    def of(
        cls, zz: Tensor, weight: Tensor, metric: Metric, *, ridge: float, columns: Tensor, scale: float = 1.0
    ) -> Part:
        """From the second moments of what it reads.

        The fit to fewer columns is a ridge fit of the change of the weight: what few rows say of it is not trusted far.

        Args:
            zz: (N, N) second moments of the columns.
            weight: (d, N), of the reader.
            metric: weight of errors.
            ridge: added to the diagonal, relative to its mean.
            columns: (n, t), see `Part`.
            scale: of the errors.

        Raises:
            FitError: the moments are not positive definite, even with the ridge.
        """
        p = torch.cholesky_inverse(factor(ridged(zz, ridge)))
        s = scale * metric.gain(weight.T.to(zz))
        return cls(p, s, columns.to(p.device), float((s * zz).sum()))


def eliminate_jointly(parts: Sequence[Part], keep: int = 1) -> Elimination:
    """Backward elimination by the sum of the readers' errors, each with its least-squares fit to the columns left.

    For each reader it is the elimination of `selection.eliminate`: without the columns G its error grows by the trace
    of P_GG^-1 S_GG, P loses U U^T with U = P_G L^-T where P_GG = L L^T, and S loses U K^T + K U^T with K = S_G L^-T -
    U (L^-1 S_GG L^-T) / 2. Of many channels several go at a time.

    Args:
        parts: at least one; of the same n channels. Their matrices are overwritten.
        keep: where to stop.

    Raises:
        FitError: there is no reader, or the matrices become singular.
    """
    if not parts:
        raise FitError("no layer reads the channels")
    n = len(parts[0].columns)
    free = torch.ones(n, dtype=torch.bool, device=parts[0].p.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    left = n - keep
    while left > 0:
        each = sum((_costs(part, free) for part in parts), torch.zeros(n, dtype=torch.float64, device=free.device))
        gone = each.masked_fill(~free, torch.inf).topk(min(left, -(-n // _MOST_STEPS)), largest=False).indices
        own = each[gone].clamp_min(0)
        total = sum(_without(part, part.columns[gone].flatten()) for part in parts)
        # the cost of all that go together, shared out as they cost one by one
        costs.append(own * (max(total, 0.0) / own.sum().clamp_min(torch.finfo(torch.float64).tiny)))
        order.append(gone)
        free[gone] = False
        left -= len(gone)
    grown = torch.cat([free.new_zeros(1, dtype=torch.float64), *costs]).cumsum(0)
    return Elimination(torch.cat([free.new_zeros(0, dtype=torch.int64), *order]), grown, n)


def _costs(part: Part, free: Tensor) -> Tensor:
    """(n,) by how much the reader's error grows without each channel; 0 for those that have gone."""
    rows, columns = part.columns[:, :, None], part.columns[:, None, :]
    p, s = part.p[rows, columns], part.s[rows, columns]
    p = torch.where(free[:, None, None], p, torch.eye(p.shape[1], dtype=p.dtype, device=p.device))
    found = torch.linalg.solve(p, s).diagonal(dim1=1, dim2=2).sum(1)
    return torch.where(free, found, 0.0)


def _without(part: Part, gone: Tensor) -> float:
    """Take columns away, in place: by how much the error grows."""
    p, s = part.p, part.s
    root = factor(p[gone][:, gone])
    u = torch.linalg.solve_triangular(root, p[gone], upper=False).T
    c = torch.linalg.solve_triangular(root, s[gone], upper=False).T
    inner = torch.linalg.solve_triangular(root, c[gone], upper=False)
    k = c - u @ inner / 2
    p.addmm_(u, u.T, alpha=-1)
    s.addmm_(u, k.T, alpha=-1).addmm_(k, u.T, alpha=-1)
    return float(inner.diagonal().sum())
