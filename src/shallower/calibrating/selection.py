"""Which channels of a hidden tensor tell most about an output, from second moments alone.

    elimination = eliminate(zz, zy, ridge=1e-4)
    kept = elimination.kept(384)
    weight = ridge_fit(zz[kept][:, kept], zy[kept], ridge=1e-4)

Pure functions of tensors. Column subset selection: of the n channels of z, keep k such that least squares from them
predicts y best. Backward elimination takes away what is missed least, one channel after another; forward selection
adds what helps most. Both are the same walk of Schur complements, one on the inverse of the Gram matrix, the other on
the matrix itself. A channel may own several columns (the taps of a convolution).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shallower.errors import FitError


@dataclass(frozen=True)
class Elimination:
    """The order in which channels go, and what that costs.

    Attributes:
        order: (removed,) int64, channels in the order in which they go.
        errors: (removed + 1,) float64; errors[m] is by how much the squared error of the best ridge fit, summed over
            outputs, has grown after the first m channels went. Starts at 0 and does not fall.
        channels: n, how many there were.
    """

    order: Tensor
    errors: Tensor
    channels: int

    def kept(self, k: int) -> Tensor:
        """The k channels that stay, ascending, int64.

        Raises:
            FitError: the elimination did not go so far, or there are not so many channels.
        """
        gone = self.channels - k
        if not 0 <= gone <= len(self.order):
            raise FitError(f"{k} of {self.channels} channels cannot stay: the elimination removed {len(self.order)}")
        stays = torch.ones(self.channels, dtype=torch.bool, device=self.order.device)
        stays[self.order[:gone]] = False
        return stays.nonzero().flatten()

    def error(self, k: int) -> float:
        """The growth of the error with k channels kept."""
        return float(self.errors[self.channels - k])


def eliminate(zz: Tensor, zy: Tensor, *, ridge: float, keep: int = 1, taps: int = 1, block: int = 64) -> Elimination:
    """Backward elimination: remove, again and again, the channel without which y is predicted hardly worse.

        eliminate(zz, zy, ridge=1e-4).kept(n // 2)

    Without channel j the squared error of the fit grows by |W_j|^2 / P_jj, where P is the inverse of zz + ridge and W =
    P zy the fit that is left. Each removal costs a rank-one update of P and W; they are gathered and done `block` at a
    time as matrix products, so that a step reads W once.

    Args:
        zz: (n * taps, n * taps) second moments of z, the columns of one channel beside one another.
        zy: (n * taps, d) cross moments of z and y, in units in which all outputs matter equally.
        ridge: added to the diagonal, relative to its mean.
        keep: where to stop.
        taps: columns that one channel owns.
        block: removals that are gathered.

    Raises:
        FitError: the moments are not finite, not positive semi-definite, or of shapes that do not fit.

    Reference: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1992, applied to
    the least-squares problem of one layer, where it is exact.
    """
    n = _channels(zz, zy, keep, taps)
    inverse = torch.cholesky_inverse(_factor(ridged(zz.double(), ridge)))
    order, scores = _walk(inverse, inverse @ zy.double(), n - keep, taps, block, largest=False)
    return Elimination(order, torch.cat([scores.new_zeros(1), scores.cumsum(0)]), n)


def select(zz: Tensor, zy: Tensor, *, ridge: float, keep: int, taps: int = 1, block: int = 64) -> Tensor:
    """Forward selection: add, again and again, the channel with which y is predicted best.

    Cheaper than `eliminate` where few channels stay, and usually a little worse.

    Args:
        zz, zy, ridge, keep, taps, block: see `eliminate`.

    Returns:
        (keep,) int64, in the order in which they were added.

    Raises:
        FitError: the moments are not finite or of shapes that do not fit.

    Reference: Chen, Billings and Luo, Orthogonal least squares methods and their application to non-linear system
    identification, 1989.
    """
    _channels(zz, zy, keep, taps)
    return _walk(ridged(zz.double(), ridge), zy.double().clone(), keep, taps, block, largest=True)[0]


def ridge_fit(zz: Tensor, zy: Tensor, ridge: float) -> Tensor:
    """The linear map W (d, n) with which W z predicts y best, from second moments.

    Args:
        zz: (n, n) second moments of z.
        zy: (n, d) cross moments.
        ridge: added to the diagonal, relative to its mean.

    Raises:
        FitError: the moments are not finite, or not positive semi-definite.
    """
    if not bool(zz.isfinite().all()) or not bool(zy.isfinite().all()):
        raise FitError("the second moments are not finite")
    return torch.cholesky_solve(zy.double(), _factor(ridged(zz.double(), ridge))).T


def fit_error(zz: Tensor, zy: Tensor, yy: float, weight: Tensor) -> float:
    """The mean squared error |y - W z|^2, summed over outputs, from second moments.

    Args:
        zz, zy: (n, n) and (n, d).
        yy: mean of |y|^2.
        weight: W (d, n).
    """
    return max(0.0, yy - float(2 * (zy.T * weight).sum() - ((weight @ zz) * weight).sum()))


def columns_of(channels: Tensor, taps: int) -> Tensor:
    """The columns that these channels own, where each has `taps` of them beside one another."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def ridged(zz: Tensor, ridge: float) -> Tensor:
    """zz with `ridge` times its mean diagonal added to the diagonal; of an all-zero matrix, the identity."""
    mean = zz.diagonal().mean()
    amount = torch.where(mean > 0, ridge * mean, torch.ones_like(mean))
    found = zz.clone()
    found.diagonal().add_(amount)
    return found


def _channels(zz: Tensor, zy: Tensor, keep: int, taps: int) -> int:
    columns = len(zz)
    if zz.shape != (columns, columns) or zy.dim() != 2 or len(zy) != columns or columns % taps:
        raise FitError(f"moments of shapes {tuple(zz.shape)} and {tuple(zy.shape)} with {taps} columns a channel")
    if not 0 <= keep <= columns // taps:
        raise FitError(f"{keep} of {columns // taps} channels cannot stay")
    if not bool(zz.isfinite().all()) or not bool(zy.isfinite().all()):
        raise FitError("the second moments are not finite")
    return columns // taps


def _factor(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise FitError("the second moments are not positive definite; use a larger ridge or more calibration data")
    return factor


def _walk(q: Tensor, b: Tensor, steps: int, taps: int, block: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Pivot `steps` channels out of q and b, each time the one with the smallest or largest b_g^T q_gg^-1 b_g.

    A pivot g leaves q - q_g q_gg^-1 q_g^T and b - q_g q_gg^-1 b_g. Pending updates are kept as u u^T and u v^T with
    q_gg = L L^T, u = q_g L^-T, v = b_g^T L^-T; only the diagonal blocks, of q and of b b^T, are always up to date.

    Args:
        q: (n * taps, n * taps), overwritten.
        b: (n * taps, d), overwritten.

    Returns:
        The pivots, (steps,), and their scores when they were taken.
    """
    n, columns = len(q) // taps, len(q)
    width = max(1, block // taps) * taps
    u, v = q.new_zeros(columns, width), q.new_zeros(b.shape[1], width)
    diagonal, squares = _blocks(q, taps), _squares(b, taps)
    free = torch.ones(n, dtype=torch.bool, device=q.device)
    floor = torch.finfo(q.dtype).tiny
    worst = -torch.inf if largest else torch.inf
    order, scores, pending = [], [], 0
    for _ in range(steps):
        score = _scores(squares, diagonal, floor).masked_fill(~free, worst)
        g = score.argmax() if largest else score.argmin()
        order.append(g)
        scores.append(score[g])
        free[g] = False
        rows = g * taps + torch.arange(taps, device=q.device)
        done = slice(0, pending)
        q_g = q[rows].T - u[:, done] @ u[rows, done].T
        b_g = b[rows] - u[rows, done] @ v[:, done].T
        root = _root(diagonal[g], floor)
        u_g = torch.linalg.solve_triangular(root, q_g.T, upper=False).T
        v_g = torch.linalg.solve_triangular(root, b_g, upper=False).T
        b_v = (b @ v_g - u[:, done] @ (v[:, done].T @ v_g)).view(n, taps, taps)
        by_channel = u_g.reshape(n, taps, taps)
        cross = b_v @ by_channel.mT
        squares = squares - cross - cross.mT + by_channel @ (v_g.T @ v_g) @ by_channel.mT
        diagonal = diagonal - by_channel @ by_channel.mT
        u[:, pending : pending + taps], v[:, pending : pending + taps] = u_g, v_g
        pending += taps
        if pending == width:
            q.addmm_(u, u.T, alpha=-1)
            b.addmm_(u, v.T, alpha=-1)
            pending = 0
            diagonal, squares = _blocks(q, taps), _squares(b, taps)
    if not order:
        return torch.zeros(0, dtype=torch.int64, device=q.device), q.new_zeros(0)
    return torch.stack(order), torch.stack(scores).clamp_min(0)


def _blocks(q: Tensor, taps: int) -> Tensor:
    """(n, taps, taps) blocks on the diagonal."""
    n = len(q) // taps
    if taps == 1:
        return q.diagonal().clone().view(n, 1, 1)
    each = torch.arange(n, device=q.device)
    return q.view(n, taps, n, taps)[each, :, each, :].clone()


def _squares(b: Tensor, taps: int) -> Tensor:
    """(n, taps, taps) products b_g b_g^T."""
    by_channel = b.view(len(b) // taps, taps, -1)
    return by_channel @ by_channel.mT


def _scores(squares: Tensor, diagonal: Tensor, floor: float) -> Tensor:
    """(n,) traces of diagonal^-1 squares."""
    if squares.shape[-1] == 1:
        return (squares / diagonal.clamp_min(floor)).flatten().clamp_min(0)
    factors, info = torch.linalg.cholesky_ex(diagonal)
    solved = torch.cholesky_solve(squares, torch.where(info.view(-1, 1, 1) == 0, factors, _identity_like(factors)))
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


def _root(matrix: Tensor, floor: float) -> Tensor:
    """Lower triangular L with L L^T = matrix, a block on the diagonal."""
    if len(matrix) == 1:
        return matrix.clamp_min(floor).sqrt()
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise FitError("the second moments are too ill-conditioned; use a larger ridge or more calibration data")
    return factor


def _identity_like(factors: Tensor) -> Tensor:
    return torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(factors)
