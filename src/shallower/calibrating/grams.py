"""Second moments that add up: all that least squares from z to y needs of the data.

gram = Gram.of(z, y) + Gram.of(z2, y2)
moments = gram.centred()
weight = moments.fit(ridge=1e-4)            # y is about weight @ (z - mean_z) + mean_y
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from shallower.calibrating.selection import (
    factor,
    fit_error,
    ridge_amount,
    ridge_fit,
)
from shallower.core.algebra import wide
from shallower.core.processes import gathered, several, summed
from shallower.core.tensors import are_finite
from shallower.errors import FitError

_ROWS = 1 << 10
"""Rows that are converted to float64, or whose products are added up in float32, at a time."""

_COLUMNS = 256
"""Rows of a block of the triangle that is stored of a symmetric matrix."""

_CPU = torch.device("cpu")

Samples = tuple[Tensor, Tensor]
"""(rows, n) and (rows, d)."""


@dataclass(frozen=True)
class _Products:
    """Sums over positions.

    Attributes:
        count: positions.
        z, y, yy: (n,), (d,) and (d,) float64, sums of z, y and y y.
        zz: the upper triangle of the (n, n) sums of products, in blocks of rows, float64.
        zy: (n, d) float64.
    """

    count: int
    z: Tensor
    y: Tensor
    yy: Tensor
    zz: tuple[Tensor, ...]
    zy: Tensor

    @classmethod
    def zeros(cls, n: int, d: int, device: torch.device) -> _Products:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        triangle = [zeros(min(_COLUMNS, n - left), n - left) for left in range(0, n, _COLUMNS)]
        return cls(0, zeros(n), zeros(d), zeros(d), tuple(triangle), zeros(n, d))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.z, self.y, self.yy, *self.zz, self.zy)

    def mapped(self, count: int, tensors: Sequence[Tensor]) -> _Products:
        """With these tensors in the place of `tensors`."""
        z, y, yy, *zz, zy = tensors
        return _Products(count, z, y, yy, tuple(zz), zy)

    def cloned(self) -> _Products:
        return self.mapped(self.count, list(map(torch.clone, self.tensors)))

    def plus(self, other: _Products) -> _Products:
        """The sums of both."""
        sums = list(map(torch.add, self.tensors, other.tensors))
        return self.mapped(self.count + other.count, sums)

    def add(self, z: Tensor, y: Tensor, dtype: torch.dtype) -> None:
        """Add the products of some rows in place."""
        a, b = z.to(self.z.device, dtype), y.to(self.z.device, dtype)
        self.z.add_(a.sum(0))
        self.y.add_(b.sum(0))
        self.yy.add_(b.square().sum(0))
        for i, block in enumerate(self.zz):
            left = i * _COLUMNS
            _add_product(block, a[:, left : left + _COLUMNS].T, a[:, left:])
        _add_product(self.zy, a.T, b)

    def square(self) -> Tensor:
        """The (n, n) matrix of which the triangle is stored."""
        n = len(self.z)
        full = self.z.new_empty(n, n)
        for i, block in enumerate(self.zz):
            left = i * _COLUMNS
            full[left : left + _COLUMNS, left:] = block
            full[left + _COLUMNS :, left : left + _COLUMNS] = block[:, _COLUMNS:].T
        return full


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _triangle(full: Tensor) -> tuple[Tensor, ...]:
    return tuple(full[left : left + _COLUMNS, left:].clone() for left in range(0, len(full), _COLUMNS))


@dataclass(frozen=True)
class Gram:
    """Sums over positions of z, y and their products; a value, so that adding never changes what was there.

        total = Gram.of(z, y) + Gram.of(z2, y2)
        total.count, total.columns, total.outputs

    As long as there are fewer rows than z has columns the rows themselves are kept, which takes less memory than their
    products and says the same. Of the symmetric products one triangle is kept.

    Attributes:
        columns, outputs: n and d.
        quick: products of up to 1,024 rows are added up in float32: twice as fast, and right to about 1e-6.
        device: where the sums are.
    """

    columns: int
    outputs: int
    quick: bool = False
    device: torch.device = _CPU
    _products: _Products | None = None
    _waiting: tuple[Samples, ...] = ()

    @classmethod
    def of(cls, z: Tensor, y: Tensor | None = None, *, quick: bool = False) -> Gram:
        """The moments of z (positions, n) and y (positions, d), of any dtype; of z alone without y."""
        if y is None:
            y = z[:, :0]
        return cls(z.shape[1], y.shape[1], quick, wide(z[:0]).device).seen(z, y)

    @property
    def count(self) -> int:
        """Positions seen."""
        count = self._waiting_rows
        if self._products is not None:
            count += self._products.count
        return count

    def seen(self, z: Tensor, y: Tensor | None = None) -> Gram:
        """The moments of these samples too.

        Args:
            z: (positions, n).
            y: (positions, d).

        Raises:
            FitError: the samples do not have n columns and d outputs.
        """
        if y is None:
            y = z[:, :0]
        if z.shape != (len(y), self.columns) or y.shape[1] != self.outputs:
            raise FitError(
                f"samples of shapes {tuple(z.shape)} and {tuple(y.shape)} where {self.columns} columns and "
                f"{self.outputs} outputs were seen before"
            )
        if not len(z):
            return self
        waiting = self._waiting_rows + len(z)
        if waiting >= self.columns:
            return replace(self, _waiting=(*self._waiting, (z.detach(), y.detach())))._folded()
        # what waits is a copy: a slice would keep the whole tensor alive
        return replace(self, _waiting=(*self._waiting, (z.detach().clone(), y.detach().clone())))

    def __add__(self, other: Gram) -> Gram:
        """The moments of both samples together."""
        if (self.columns, self.outputs) != (other.columns, other.outputs):
            raise FitError("Gram matrices of different sites do not add up")
        products = self._products or other._products
        if self._products is not None and other._products is not None:
            products = self._products.plus(other._products)
        both = replace(self, _products=products, _waiting=(*self._waiting, *other._waiting))
        if both._waiting_rows >= self.columns:
            return both._folded()
        return both

    @property
    def _waiting_rows(self) -> int:
        return sum(len(z) for z, _ in self._waiting)

    def _rows(self) -> Samples:
        """All rows that wait, one below the other."""
        if len(self._waiting) == 1:
            return self._waiting[0]
        z, y = zip(*self._waiting, strict=True)
        return torch.cat(z), torch.cat(y)

    def _folded(self) -> Gram:
        """The same with no rows waiting."""
        if not self._waiting:
            return self
        z, y = self._rows()
        if self._products is None:
            products = _Products.zeros(self.columns, self.outputs, self.device)
        else:
            products = self._products.cloned()
        dtype = torch.float64
        if self.quick:
            dtype = torch.float32
        for start in range(0, len(z), _ROWS):
            products.add(z[start : start + _ROWS], y[start : start + _ROWS], dtype)
        return replace(self, _products=replace(products, count=products.count + len(z)), _waiting=())

    def part(self, columns: slice | Tensor) -> Gram:
        """The moments of some columns of z, and y."""
        waiting = tuple((z[:, columns], y) for z, y in self._waiting)
        products, n = self._products, len(torch.empty(self.columns, device=self.device)[columns])
        if products is not None:
            square = products.square()[columns][:, columns]
            zz, zy = _triangle(square), products.zy[columns]
            products = replace(products, z=products.z[columns], zz=zz, zy=zy)
        return replace(self, columns=n, _products=products, _waiting=waiting)

    def through(self, kept: Tensor, start: int, down: Tensor | None) -> Gram:
        """The moments of [z_kept, D x] and y, where the columns are [z, x]; of z_kept alone without D.

        Args:
            kept: (k,) int64, columns of z.
            start: how many columns z has.
            down: D (rank, n - start).
        """
        if down is None:
            return self.part(kept)

        def seen(columns: Tensor) -> Tensor:
            """The rows of a matrix with the columns' places in front, mapped alike."""
            return torch.cat([columns[kept], (down.to(columns) @ columns[start:])])

        waiting = tuple((seen(wide(z).T).T, y) for z, y in self._waiting)
        products = self._products
        if products is not None:
            # with S = [rows of the identity; D], z becomes S z and zz becomes S zz S^T
            zz = seen(seen(products.square()).T)
            products = replace(products, z=seen(products.z), zz=_triangle(zz), zy=seen(products.zy))
        return replace(self, columns=len(kept) + len(down), _products=products, _waiting=waiting)

    def over_processes(self) -> Gram:
        """The moments of the samples of all processes; itself where there is one."""
        if not several():
            return self
        # rows can be gathered where all processes have rows, and together fewer than columns
        count = self.count
        if self._products is not None:
            count = self.columns
        if sum(gathered(count)) < self.columns:
            rows = []
            for z, y in chain.from_iterable(gathered([(z.cpu(), y.cpu()) for z, y in self._waiting])):
                rows.append((z.to(self.device), y.to(self.device)))
            return replace(self, _waiting=tuple(rows))
        own = self._folded()._products or _Products.zeros(self.columns, self.outputs, self.device)
        total = sum(gathered(own.count))
        return replace(self, _products=own.mapped(total, list(map(summed, own.tensors))), _waiting=())

    def centred(self, intercept: bool = True) -> Centred:
        """Means and second moments; about the means where the fit has an intercept, about 0 where it has none.

        Raises:
            FitError: too little was seen, or something was not finite.
        """
        # the mean takes one position by itself
        if self.count < 1 + intercept:
            raise FitError(f"only {self.count} positions were seen: too few calibration data to fit anything")
        if not self.is_finite():
            raise FitError("a value is not finite: does the model overflow on the calibration batches?")
        if self._products is None and self.count < self.columns:
            z, y = self._rows()
            return _centred_rows(wide(z), wide(y), intercept)
        products = self._folded()._products
        assert products is not None
        return _centred_products(products, intercept)

    def is_finite(self) -> bool:
        """Whether every value seen was finite, and every sum."""
        given = list(chain.from_iterable(self._waiting))
        if self._products is not None:
            given += self._products.tensors
        return are_finite(given)


def _centred_rows(z: Tensor, y: Tensor, intercept: bool) -> Centred:
    mean_z, mean_y = z.mean(0), y.mean(0)
    if not intercept:
        mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
    scale = len(z) ** -0.5
    z, y = (z - mean_z).mul_(scale), (y - mean_y).mul_(scale)
    return Centred(mean_z, mean_y, y.square().sum(0), rows=(z, y))


def _centred_products(sums: _Products, intercept: bool) -> Centred:
    mean_z, mean_y = sums.z / sums.count, sums.y / sums.count
    if not intercept:
        mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
    # E[(z - m)(y - m)^T] = E[z y^T] - m m^T
    zz = sums.square().div_(sums.count).addr_(mean_z, mean_z, alpha=-1)
    zy = (sums.zy / sums.count).addr_(mean_z, mean_y, alpha=-1)
    yy = (sums.yy / sums.count - mean_y.square()).clamp_min(0)
    return Centred(mean_z, mean_y, yy, products=(zz, zy))


@dataclass(frozen=True)
class Centred:
    """Moments for a least-squares fit y = W (z - mean_z) + mean_y.

    With fewer rows than columns the moments are kept as rows, Z (r, n) and Y (r, d) with zz = Z^T Z and zy = Z^T Y, and
    what can be computed from these is: W = Y^T (Z Z^T + a)^-1 Z needs no (n, n) matrix.

    Attributes:
        mean_z, mean_y: (n,) and (d,); zero where the fit has no intercept.
        yy: (d,) float64, second moment of each output.
        products: zz (n, n) and zy (n, d), float64; None where there are rows.
        rows: Z and Y; None where there are products.
    """

    mean_z: Tensor
    mean_y: Tensor
    yy: Tensor
    products: tuple[Tensor, Tensor] | None = None
    rows: Samples | None = None

    @cached_property
    def zz(self) -> Tensor:
        """(n, n) second moments of z; made from the rows and kept, where there are rows."""
        if self.products is not None:
            return self.products[0]
        z, _ = self._factors
        return z.T @ z

    @cached_property
    def zy(self) -> Tensor:
        """(n, d) cross moments of z and y; made from the rows and kept, where there are rows."""
        if self.products is not None:
            return self.products[1]
        z, y = self._factors
        return z.T @ y

    @property
    def _factors(self) -> Samples:
        assert self.rows is not None
        return self.rows

    @property
    def squares(self) -> Tensor:
        """(n,) the diagonal of zz."""
        if self.rows is not None:
            return self.rows[0].square().sum(0)
        return self.zz.diagonal()

    def without(self, columns: Tensor) -> Centred:
        """The same with some columns of z as zeros."""
        mean_z = self.mean_z.index_fill(0, columns, 0)
        if self.rows is not None:
            z, y = self.rows
            return replace(self, mean_z=mean_z, rows=(z.index_fill(1, columns, 0), y))
        zz = self.zz.index_fill(0, columns, 0).index_fill(1, columns, 0)
        return replace(self, mean_z=mean_z, products=(zz, self.zy.index_fill(0, columns, 0)))

    def beyond(self, weight: Tensor) -> Centred:
        """The moments of z and of what a map W (d, n) leaves of y."""
        mean_y = self.mean_y - weight @ self.mean_z
        if self.rows is not None:
            z, y = self.rows
            left = y - z @ weight.T
            return replace(self, mean_y=mean_y, yy=left.square().sum(0), rows=(z, left))
        given = self.zz @ weight.T
        yy = self.yy + (weight.T * (given - 2 * self.zy)).sum(0)
        return replace(self, mean_y=mean_y, yy=yy.clamp_min(0), products=(self.zz, self.zy - given))

    def fit(self, ridge: float) -> Tensor:
        """The linear map W (d, n) with which W (z - mean_z) + mean_y predicts y best.

        Args:
            ridge: added to the diagonal of zz, relative to its mean.

        Raises:
            FitError: the moments are not positive definite, even with the ridge.

        Reference: Saunders, Gammerman and Vovk, Ridge regression learning algorithm in dual variables, 1998, for the
        form that needs the products of rows only.
        """
        if self.rows is None:
            return ridge_fit(self.zz, self.zy, ridge)
        z, _ = self.rows
        return self._dual(ridge).T @ z

    def _dual(self, ridge: float) -> Tensor:
        """(r, d) (Z Z^T + a)^-1 Y."""
        z, y = self._factors
        inner = z @ z.T
        inner.diagonal().add_(ridge_amount(self.squares, ridge))
        return torch.cholesky_solve(y, factor(inner))

    def error(self, weight: Tensor, diagonal: Tensor) -> float:
        """The mean squared error of a map W (d, n) on these moments, each output weighted by `diagonal` (d,)."""
        if self.rows is not None:
            z, y = self.rows
            return float(((y - z @ weight.T).square().sum(0) * diagonal).sum())
        scale = diagonal.sqrt()
        yy = float((self.yy * diagonal).sum())
        return fit_error(self.zz, self.zy * scale, yy, scale[:, None] * weight)


def ridge_error(fit: Centred, held: Centred, ridge: float, diagonal: Tensor) -> float:
    """The mean squared error on `held` of the ridge fit to `fit`, each output weighted by `diagonal` (d,).

    Where both are rows the fitted map is never formed.

    Raises:
        FitError: the moments are not positive definite, even with the ridge.
    """
    if fit.rows is None or held.rows is None:
        return held.error(fit.fit(ridge), diagonal)
    z, y = held.rows
    predicted = (z @ fit.rows[0].T) @ fit._dual(ridge)
    return float(((y - predicted).square().sum(0) * diagonal).sum())
