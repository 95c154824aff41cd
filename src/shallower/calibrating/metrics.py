"""The weight of errors at the outputs of a site's consumers, and the elimination of channels by it.

    metric = Metric(plain, blocks)
    elimination = metric.elimination(moments, ridge=1e-4)

M = diag(plain) + the second moments of gradients (see `fisher.py`), one block for each consumer. The matrix itself,
(outputs x outputs), is made only where a root of it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shallower.calibrating.grams import Centred
from shallower.calibrating.selection import Elimination, eliminate, eliminate_rows, factor

_NOTHING = 1e-9
_THIN = 4
"""Elimination works on rows where they are fewer than this part of the columns, and on products otherwise."""


@dataclass(frozen=True)
class Metric:
    """The weight M of errors e at a site's outputs: their damage is e M e^T.

        damage = Metric(torch.ones(d)).gain(errors).trace()

    Attributes:
        plain: (d,) float64, positive: weights of single outputs.
        blocks: for each consumer the second moments of its outputs' gradients, which are added; empty for none.
    """

    plain: Tensor
    blocks: tuple[Centred, ...] = ()

    def without(self, outputs: Tensor) -> Metric:
        """The same with errors at these outputs counting for nothing, or nearly."""
        if not len(outputs):
            return self
        plain = self.plain.clone()
        plain[outputs.to(plain.device)] = _NOTHING * self.plain.mean()
        blocks: list[Centred] = []
        start = 0
        for block in self.blocks:
            width = len(block.squares)
            own = outputs[(outputs >= start) & (outputs < start + width)] - start
            blocks.append(block.without(own.to(plain.device)))
            start += width
        return Metric(plain, tuple(blocks))

    @cached_property
    def diagonal(self) -> Tensor:
        """(d,) of M."""
        if not self.blocks:
            return self.plain
        return self.plain + torch.cat([block.squares for block in self.blocks])

    def gain(self, y: Tensor) -> Tensor:
        """(m, m) products y M y^T of rows y (m, d)."""
        total = (y * self.plain) @ y.T
        end = 0
        for block in self.blocks:
            start, end = end, end + len(block.mean_z)
            part = y[:, start:end]
            # y G y^T with G = Z^T Z is (y Z^T) (y Z^T)^T, without G where there are few rows
            if block.rows is None:
                total += part @ block.zz @ part.T
            else:
                seen = part @ block.rows[0].T
                total += seen @ seen.T
        return total

    @cached_property
    def root(self) -> Tensor:
        """(d, d) lower triangular L with L L^T = M, for what needs errors in units in which all matter equally: e L."""
        if not self.blocks:
            return torch.diag(self.plain.sqrt())
        whole: Tensor = torch.block_diag(*(block.zz for block in self.blocks))  # type: ignore[no-untyped-call]
        whole.diagonal().add_(self.plain)
        return factor(whole)

    def elimination(self, moments: Centred, *, ridge: float, keep: int = 0, taps: int = 1) -> Elimination:
        """Backward elimination of the channels of z by what is lost of y; see `selection.eliminate`.

        Args:
            moments: of z and y.
            ridge: added to the diagonal of zz, relative to its mean.
            keep: where to stop.
            taps: columns that one channel owns.
        """
        rows = moments.rows
        if rows is not None and _THIN * len(rows[0]) <= rows[0].shape[1]:
            return eliminate_rows(rows[0], self.gain(rows[1]), ridge=ridge, keep=keep, taps=taps)
        return eliminate(moments.zz, moments.zy, ridge=ridge, keep=keep, taps=taps, gain=self.gain)
