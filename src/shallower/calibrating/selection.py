"""Which channels of a hidden tensor tell most about an output, from second moments alone.

    elimination = eliminate(zz, zy, ridge=1e-4)
    kept = elimination.kept(384)
    weight = ridge_fit(zz[kept][:, kept], zy[kept], ridge=1e-4)

Pure functions of tensors. Column subset selection: of the n channels of z, keep k such that least squares from them
predicts y best. Backward elimination removes what is missed least, one channel after another, by Schur complements of
the inverse of the Gram matrix. A channel may own several columns (the taps of a convolution).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shallower.core.tensors import are_finite
from shallower.errors import FitError

_NOT_FINITE = "the second moments are not finite: does the model overflow on the calibration batches?"
_ILL_CONDITIONED = "the second moments are not positive definite; use a larger ridge or more calibration data"

_BLOCK = 64
"""Columns that are removed before the pending updates are done."""

_COMPACT = 0.75
"""Removed channels are cut out of the matrices when fewer than this part are left."""


Removed = tuple[Tensor, Tensor]
"""(m,) int64, channels in the order in which they go; (m,) by how much the error grows with each."""


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


def _squared(w: Tensor) -> Tensor:
    return w @ w.T


def eliminate(
    zz: Tensor,
    zy: Tensor,
    *,
    ridge: float,
    keep: int = 1,
    taps: int = 1,
    block: int = _BLOCK,
    gain: Callable[[Tensor], Tensor] = _squared,
) -> Elimination:
    """Backward elimination: remove, again and again, the channel without which y is predicted hardly worse.

        eliminate(zz, zy, ridge=1e-4).kept(n // 2)

    Without channel j the squared error of the fit grows by |W_j|^2 / P_jj, where P is the inverse of zz + ridge and W =
    P zy the fit that is left. Only the products S = W W^T of its rows are needed, so that many outputs cost no more
    than few. Each removal is a rank-one update of P and a rank-two update of S; they are gathered and done `block` at a
    time as matrix products.

    Args:
        zz: (n * taps, n * taps) second moments of z, the columns of one channel beside one another.
        zy: (n * taps, d) cross moments of z and y, in units in which all outputs matter equally.
        ridge: added to the diagonal, relative to its mean.
        keep: where to stop.
        taps: columns that one channel owns.
        block: removals that are gathered.
        gain: the products W M W^T of the rows of W (n * taps, d), with a weight M of errors; by default without one.

    Raises:
        FitError: the moments are not finite, not positive semi-definite, or of shapes that do not fit.

    Reference: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1992, applied to
    the least-squares problem of one layer, where it is exact.
    """
    n = _channels_of(zz, zy, keep, taps)
    inverse = torch.cholesky_inverse(factor(ridged(zz.double(), ridge)))
    # to multiply W and not zy keeps what is small of it: P would enlarge rounding errors of zy zy^T by its square
    return _elimination(_walk(inverse, gain(inverse @ zy.double()), n - keep, taps, block), n)


def eliminate_rows(z: Tensor, yy: Tensor, *, ridge: float, keep: int = 1, taps: int = 1) -> Elimination:
    """The same elimination from a few rows, without any matrix of (channels, channels).

        eliminate_rows(z, y @ y.T, ridge=1e-4).kept(n // 2)

    With K = z z^T + ridge and Q = z^T K^-1 z, P is (1 - Q) / ridge and W is z^T K^-1 y: only K^-1 and the diagonal
    blocks of Q and W W^T are kept, and each removal is a rank-one update of these. They are made anew from the columns
    that are left every so often, so that rounding does not add up.

    Args:
        z: (rows, n * taps), scaled so that z^T z are the second moments.
        yy: (rows, rows) products y M y^T of the rows' outputs, with the weight M of errors.
        ridge, keep, taps: see `eliminate`.

    Raises:
        FitError: the rows are not finite, or of shapes that do not fit.

    Reference: as for `eliminate`; the inverse by Sherman, Morrison and Woodbury's formula.
    """
    if yy.shape != (len(z), len(z)) or z.shape[1] % taps:
        raise FitError(f"rows of shape {tuple(z.shape)} and products of shape {tuple(yy.shape)} with {taps} taps")
    _check_finite(z, yy)
    n = _checked_channels(z.shape[1] // taps, keep)
    z = z.double().clone()
    amount = ridge_amount(z.square().sum(0), ridge)
    return _elimination(_walk_rows(z, yy.double(), amount, n - keep, taps), n)


def ridge_fit(zz: Tensor, zy: Tensor, ridge: float) -> Tensor:
    """The linear map W (d, n) with which W z predicts y best, from second moments.

    Args:
        zz: (n, n) second moments of z.
        zy: (n, d) cross moments.
        ridge: added to the diagonal, relative to its mean.

    Raises:
        FitError: the moments are not finite, or not positive semi-definite.
    """
    _check_finite(zz, zy)
    return torch.cholesky_solve(zy.double(), factor(ridged(zz.double(), ridge))).T


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
    found = zz.clone()
    found.diagonal().add_(ridge_amount(zz.diagonal(), ridge))
    return found


def ridge_amount(diagonal: Tensor, ridge: float) -> Tensor:
    """`ridge` times the mean of a diagonal; 1 where that is 0."""
    mean = diagonal.mean()
    return torch.where(mean > 0, ridge * mean, torch.ones_like(mean))


def factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor L, lower triangular with L L^T = matrix.

    Raises:
        FitError: the matrix is not positive definite.
    """
    found: Tensor
    found, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise FitError(_ILL_CONDITIONED)
    return found


def _channels_of(zz: Tensor, zy: Tensor, keep: int, taps: int) -> int:
    columns = len(zz)
    if zz.shape != (columns, columns) or zy.dim() != 2 or len(zy) != columns or columns % taps:
        raise FitError(f"moments of shapes {tuple(zz.shape)} and {tuple(zy.shape)} with {taps} columns a channel")
    _check_finite(zz, zy)
    return _checked_channels(columns // taps, keep)


def _check_finite(*given: Tensor) -> None:
    if not are_finite(given):
        raise FitError(_NOT_FINITE)


def _checked_channels(channels: int, keep: int) -> int:
    if not 0 <= keep <= channels:
        raise FitError(f"{keep} of {channels} channels cannot stay")
    return channels


def _walk(p: Tensor, s: Tensor, steps: int, taps: int, block: int) -> Removed:
    """Remove `steps` channels, each time the one with the least trace of P_gg^-1 S_gg.

    Args:
        p: (n * taps, n * taps), the inverse of the ridged second moments; overwritten.
        s: (n * taps, n * taps), the products of rows of W; overwritten.
    """
    left = torch.arange(len(p) // taps, device=p.device)
    free = torch.ones_like(left, dtype=torch.bool)
    found: list[Removed] = []
    while steps:
        count = min(max(1, block // taps), steps)
        (gone, costs), u, k = _round(p, s, free, count, taps)
        found.append((left[gone], costs))
        steps -= count
        free[gone] = False
        p.addmm_(u, u.T, alpha=-1)
        s.addmm_(u, k.T, alpha=-1).addmm_(k, u.T, alpha=-1)
        if steps and free.sum() < _COMPACT * len(free):
            columns = columns_of(free.nonzero().flatten(), taps)
            p, s = p[columns][:, columns], s[columns][:, columns]
            left, free = left[free], free[free]
    return _all_removed(found, p)


def _round(p: Tensor, s: Tensor, free: Tensor, count: int, taps: int) -> tuple[Removed, Tensor, Tensor]:
    """Some removals, p and s as they were; afterwards p - U U^T and s - U K^T - K U^T take their places.

    Without channel g, with P_gg = L L^T, P loses u u^T where u = P_g L^-T, and W loses u v^T where v = W_g^T L^-T, so
    that S = W W^T loses u k^T + k u^T where k = S_g L^-T - u (L^-1 S_gg L^-T) / 2. Only the diagonal blocks of both are
    always up to date.
    """
    n = len(free)
    u, k = p.new_zeros(len(p), count * taps), p.new_zeros(len(p), count * taps)
    diagonal, squares, free = _diagonal_blocks(p, taps), _diagonal_blocks(s, taps), free.clone()
    order, costs = [], []
    for done in range(0, count * taps, taps):
        score = _costs_of_removal(squares, diagonal).masked_fill(~free, torch.inf)
        g = score.argmin()
        order.append(g)
        costs.append(score[g])
        free[g] = False
        rows = columns_of(g[None], taps)
        earlier, now = slice(0, done), slice(done, done + taps)
        u_rows, k_rows = u[rows, earlier].T, k[rows, earlier].T
        p_g = p[rows].T - u[:, earlier] @ u_rows
        s_g = s[rows].T - u[:, earlier] @ k_rows - k[:, earlier] @ u_rows
        root = _root(diagonal[g])
        u_g = torch.linalg.solve_triangular(root, p_g.T, upper=False).T
        c = torch.linalg.solve_triangular(root, s_g.T, upper=False).T
        k_g = c - u_g @ torch.linalg.solve_triangular(root, c[rows], upper=False) / 2
        u[:, now], k[:, now] = u_g, k_g
        u_g, k_g = u_g.reshape(n, taps, taps), k_g.reshape(n, taps, taps)
        cross = _products(u_g, k_g)
        diagonal = diagonal - _products(u_g, u_g)
        squares = squares - cross - cross.mT
    return (torch.stack(order), torch.stack(costs)), u, k


def _walk_rows(z: Tensor, yy: Tensor, amount: Tensor, steps: int, taps: int) -> Removed:
    """The same removals from rows.

    Args:
        z: (rows, n * taps); the columns of removed channels become 0.
        yy: (rows, rows), the products of the rows' outputs.
        amount: what the ridge adds.
    """
    free = torch.ones(z.shape[1] // taps, dtype=torch.bool, device=z.device)
    found: list[Removed] = []
    while steps:
        count = min(max(1, _BLOCK // taps), steps)
        gone, costs = _round_of_rows(z, yy, amount, free, count, taps)
        found.append((gone, costs))
        steps -= count
        free[gone] = False
        z[:, columns_of(gone, taps)] = 0
    return _all_removed(found, z)


def _round_of_rows(z: Tensor, yy: Tensor, amount: Tensor, free: Tensor, count: int, taps: int) -> Removed:
    """Some removals: with M = (1 - Q_gg)^-1, channel g adds Q_jg M Q_gj to Q_jj, and Q_jg M W_g to W_j.

    Q_jg = z_j^T K^-1 z_g and W_j W_g^T = z_j^T K^-1 yy K^-1 z_g, so that one product with z a removal is all.
    """
    n, free = len(free), free.clone()
    inner = z @ z.T
    inner.diagonal().add_(amount)
    inverse = torch.cholesky_inverse(factor(inner))
    by_channel = z.T.reshape(n, taps, -1)
    solved = (inverse @ z).T.reshape(n, taps, -1)
    q = _products(by_channel, solved)
    squares = _products(solved, (yy @ inverse @ z).T.reshape(n, taps, -1))
    one = torch.eye(taps, dtype=z.dtype, device=z.device)
    order, costs = [], []
    for _ in range(count):
        score = _costs_of_removal(squares, (one - q) / amount).masked_fill(~free, torch.inf)
        g = score.argmin()
        order.append(g)
        costs.append(score[g])
        free[g] = False
        a = inverse @ z[:, columns_of(g[None], taps)]
        both = (z.T @ torch.cat([a, inverse @ (yy @ a)], 1)).view(n, taps, 2 * taps)
        beside, cross = both[..., :taps], both[..., taps:]
        # M = (1 - Q_gg)^-1, from Sherman, Morrison and Woodbury: K - z_g z_g^T has the inverse K^-1 + a M a^T
        m = torch.linalg.inv(one - q[g])
        times = _each_times(beside, m)
        grown = _products(times, cross)
        squares = squares + grown + grown.mT + _products(_each_times(times, squares[g]), times)
        q = q + _products(times, beside)
        inverse = inverse + a @ m @ a.T
    return torch.stack(order), torch.stack(costs)


def _each_times(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Each block times a small matrix; see `_products`."""
    if len(matrix) == 1:
        return blocks * matrix
    return blocks @ matrix


def _all_removed(found: list[Removed], like: Tensor) -> Removed:
    if not found:
        return torch.zeros(0, dtype=torch.int64, device=like.device), like.new_zeros(0)
    orders, costs = zip(*found, strict=True)
    return torch.cat(orders), torch.cat(costs)


def _elimination(removed: Removed, channels: int) -> Elimination:
    order, costs = removed
    return Elimination(order, torch.cat([costs.new_zeros(1), costs.clamp_min(0).cumsum(0)]), channels)


def _diagonal_blocks(q: Tensor, taps: int) -> Tensor:
    """(n, taps, taps) blocks on the diagonal."""
    n = len(q) // taps
    if taps == 1:
        return q.diagonal().clone().view(n, 1, 1)
    each = torch.arange(n, device=q.device)
    return q.view(n, taps, n, taps)[each, :, each, :].clone()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of each block; of single rows without matrix products, since many small ones take longer."""
    if a.shape[1] == 1:
        return (a * b).sum(-1, keepdim=True)
    return a @ b.mT


def _costs_of_removal(squares: Tensor, diagonal: Tensor) -> Tensor:
    """(n,) traces of diagonal^-1 squares."""
    if squares.shape[-1] == 1:
        return (squares / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny)).flatten().clamp_min(0)
    factors, info = torch.linalg.cholesky_ex(diagonal)
    solved = torch.cholesky_solve(squares, torch.where(info.view(-1, 1, 1) == 0, factors, _identity_like(factors)))
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


def _root(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L^T = matrix, a block on the diagonal."""
    if len(matrix) == 1:
        return matrix.clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
    return factor(matrix)


def _identity_like(factors: Tensor) -> Tensor:
    return torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(factors)
