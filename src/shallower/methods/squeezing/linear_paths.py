"""A linear path beside the channels that stay: y = C z_kept + U D x, of the rank that pays.

    elimination = eliminate_beyond(moments, n, root, ridge=1e-4)
    gains = path_gains(moments, elimination, root, ridge=1e-4)
    k, rank, error = gains.best(width)                  # together they cost what `width` kept channels cost
    kept = elimination.kept(k)
    down = path(moments, n, kept, rank, root, ridge=1e-4)
    gram = gram.through(kept, n, down)                  # of [z_kept, D x] and y: what the consumers are fitted to

Pure functions of second moments of [z, x] and y: z is what a site's consumers read, x what its producer reads, y
what the consumers should give. A channel of the path costs what a kept channel costs (less where a gate is a layer of
its own), so that at a given cost each direction of x competes with the least important channel.

For given kept channels the best path is the reduced-rank regression of what they leave of y on what they leave of x:
the leading left singular vectors of L^-1 S_xy R, where S are second moments given z_kept, S_xx = L L^T, and R is the
root of the weight of errors; the squared singular values are the errors that its directions take away. The channels
beside a path are chosen by what they tell beyond all of x: what is linear of them need not stay.

Reference: Izenman, Reduced-rank regression for the multivariate linear model, 1975, theorem 1; Davies and Tso,
Procedures for reduced-rank regression, 1982.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shallower.calibrating.grams import Centred
from shallower.calibrating.selection import Elimination, eliminate, factor, ridged
from shallower.errors import FitError

_DENSE = 16
"""From this part of all channels on, the gains of a path are computed at every half octave of their number; below, at
every octave, since the first channels may take away nearly all of the error."""

_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class PathGains:
    """By how much a linear path lowers the error beside channels that stay.

    Attributes:
        errors: (n + 1,) float64, the error with k channels kept and no path, from k = 0, beyond that with all channels.
        widths: (m,) int64, ascending, from 1 to n: numbers of kept channels.
        shares: (m, q + 1) float64: what part of that error the best path of rank 0 .. q takes away beside so many.
        price: what a channel of the path costs, where a kept channel costs 1.
    """

    errors: Tensor
    widths: Tensor
    shares: Tensor
    price: float = 1.0

    def best(self, width: float, multiple: int = 1, most: int | None = None) -> tuple[int, int, float]:
        """How many channels and which rank give the least error, together for the cost of so many kept channels.

        Args:
            width: at least 1. What is left over because of `multiple` is not spent.
            multiple: of this are the rank and, beside a path, the number of kept channels.
            most: the highest rank.

        Returns:
            Kept channels (at least 1), the rank (0 for no path), and the error.
        """
        whole = min(int(width), len(self.errors) - 1)
        ranks = torch.arange(0, self.shares.shape[1], multiple)
        if most is not None:
            ranks = ranks[ranks <= most]
        channels = torch.floor((width - self.price * ranks) / multiple + 1e-9).long() * multiple
        channels[0] = whole
        allowed = (channels > 0) & (channels <= whole)
        ranks, channels = ranks[allowed], channels[allowed]
        errors = self.errors[channels] * (1 - self._share(channels, ranks))
        at = int(errors.argmin())
        return int(channels[at]), int(ranks[at]), float(errors[at])

    def _share(self, channels: Tensor, ranks: Tensor) -> Tensor:
        """What part of the error such paths take away, linearly between the widths."""
        above = torch.searchsorted(self.widths, channels).clamp(1, len(self.widths) - 1)
        low, high = self.widths[above - 1], self.widths[above]
        part = (channels - low) / (high - low)
        return torch.lerp(self.shares[above - 1, ranks], self.shares[above, ranks], part.to(self.shares))


def eliminate_beyond(moments: Centred, channels: int, root: Tensor, *, ridge: float) -> Elimination:
    """Backward elimination of all channels of z by what they tell about y beyond what x tells.

    Args:
        moments: of [z, x] and y.
        channels: n, how many columns z has.
        root: (d_out, d_out), the square root of the weight of errors.
        ridge: added to the diagonal, relative to its mean, for z and x apart.

    Returns:
        The order, and the errors beside all of x.

    Raises:
        FitError: the moments are not finite or not positive definite.
    """
    zz, cross, xx = _moment_blocks(moments, channels, torch.arange(channels, device=root.device), ridge)
    told = torch.cat([cross.T, moments.zy[channels:] @ root], 1)
    left = torch.linalg.solve_triangular(factor(xx), told, upper=False)
    known = left[:, :channels].T @ left
    # the ridge is in already; a little more keeps what rounding leaves positive
    return eliminate(
        zz - known[:, :channels], moments.zy[:channels] @ root - known[:, channels:], ridge=_LEAST_VARIANCE, keep=0
    )


def path_gains(
    moments: Centred, elimination: Elimination, root: Tensor, *, ridge: float, price: float = 1.0
) -> PathGains:
    """What a linear path takes away of the error, of every rank and beside any number of kept channels.

    The channels are kept in the order of the elimination, so that one Cholesky factor serves all numbers of them;
    between a few numbers the gains are interpolated.

    Args:
        moments: of [z, x] and y.
        elimination: of all channels of z, whichever way.
        root: (d_out, d_out), the square root of the weight of errors.
        ridge: added to the diagonal, relative to its mean, for z and x apart.
        price: what a channel of the path costs, where a kept channel costs 1.

    Raises:
        FitError: the moments are not positive definite, or the elimination left channels.
    """
    n = elimination.channels
    if len(elimination.order) != n:
        raise FitError(f"the elimination removed {len(elimination.order)} of {n} channels: all are needed here")
    order = elimination.order.flip(0)
    d_in = len(moments.zz) - n
    zz, cross, xx = _moment_blocks(moments, n, order, ridge)
    xy, zy = moments.zy[n:] @ root, moments.zy[:n][order] @ root
    left = torch.linalg.solve_triangular(factor(zz), torch.cat([cross, zy], 1), upper=False)
    widths = _widths(n)
    told = left[:, d_in:].square().sum(1)
    errors = torch.cat([told, told.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    known = xx.new_zeros(d_in, d_in + len(root))
    shares: list[Tensor] = []
    before = 0
    for k in widths.tolist():
        rows = left[before:k]
        known, before = known + rows[:, :d_in].T @ rows, k
        if k == n:  # there is no error, and whatever the path tells is beyond it
            shares.append(shares[-1])
            break
        beyond = torch.linalg.solve_triangular(factor(xx - known[:, :d_in]), xy - known[:, d_in:], upper=False)
        # what a path of rank r adds is the sum of the r largest squared singular values
        each = torch.linalg.eigvalsh(_smaller_gram(beyond)).flip(0).clamp_min(0)
        gains = torch.cat([each.new_zeros(1), each.cumsum(0)])
        shares.append(gains / errors[k].clamp_min(torch.finfo(torch.float64).tiny))
    return PathGains(errors.cpu(), widths, torch.stack(shares).cpu(), price)


def path(moments: Centred, channels: int, kept: Tensor, rank: int, root: Tensor, *, ridge: float) -> Tensor:
    """D (rank, d_in): the directions of x that tell most about y beyond what the kept channels of z tell.

    Scaled so that D x varies as much as the channels of z do on average.

    Args:
        moments: of [z, x] and y.
        channels: n, how many columns z has.
        kept: (k,) int64, columns of z; may be none.
        rank: 1 .. min(d_in, d_out).
        root: (d_out, d_out), the square root of the weight of errors.
        ridge: added to the diagonal, relative to its mean, for z and x apart.

    Raises:
        FitError: the rank is out of range, or the moments are not positive definite.
    """
    zz, cross, xx = _moment_blocks(moments, channels, kept, ridge)
    xy, zy = moments.zy[channels:] @ root, moments.zy[:channels][kept] @ root
    if not 1 <= rank <= min(xy.shape):
        raise FitError(f"no linear path from {len(xy)} inputs to {xy.shape[1]} outputs has the rank {rank}")
    left = torch.linalg.solve_triangular(factor(zz), torch.cat([cross, zy], 1), upper=False)
    known = left[:, : len(xx)].T @ left
    left_of_x = factor(xx - known[:, : len(xx)])
    told = torch.linalg.solve_triangular(left_of_x, xy - known[:, len(xx) :], upper=False)
    leading = torch.linalg.svd(told, full_matrices=False)[0][:, :rank]
    down: Tensor = torch.linalg.solve_triangular(left_of_x.T, leading, upper=True).T
    inside = moments.zz[channels:, channels:]
    varies = ((down @ inside) * down).sum(1)
    wanted = moments.zz[:channels, :channels].diagonal().mean()
    tiny = torch.finfo(torch.float64).tiny
    down = down * (wanted.clamp_min(tiny) / varies.clamp_min(tiny)).sqrt()[:, None]
    if not bool(down.isfinite().all()):
        return torch.zeros_like(down)
    return down


def _smaller_gram(matrix: Tensor) -> Tensor:
    """A^T A or A A^T, whichever is smaller: both have the squared singular values of A."""
    transposed: Tensor = matrix.T
    if len(matrix) > len(transposed):
        return transposed @ matrix
    return matrix @ transposed


def _widths(n: int) -> Tensor:
    """Ascending, 1 to n, about evenly spaced on a scale of logarithms."""
    found = {1, n}
    size = float(n)
    while size > 1:
        found.add(round(size))
        step = 2.0
        if size > n / _DENSE:
            step = 2**0.5
        size /= step
    return torch.tensor(sorted(found))


def _moment_blocks(moments: Centred, channels: int, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments of the kept columns of z, of these with x, and of x; the first and the last with their ridge."""
    zz, xx = moments.zz[:channels, :channels], moments.zz[channels:, channels:]
    return ridged(zz, ridge)[kept][:, kept], moments.zz[kept][:, channels:], ridged(xx, ridge)
