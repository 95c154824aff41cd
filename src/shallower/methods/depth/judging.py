"""How far a network is from the dense one on rows that nothing is fitted to.

fitted, held = set_apart(batches)
judge = Judge(dense, Calibration(held, options))
judge.divergence(small)
"""

from __future__ import annotations

from torch import nn

from shallower.calibrating.site_grams import fitted_rows
from shallower.core.batches import Batch, Batches
from shallower.core.inputs import model_device
from shallower.core.modes import evaluating
from shallower.core.processes import summed_over_processes
from shallower.core.trees import cut, rows_of
from shallower.methods.squeezing.calibration import Calibration, Wanted, divergences, wanted_on

_KEPT = 1 << 28
"""Bytes of the dense network's outputs that are kept."""


def set_apart(batches: Batches) -> tuple[Batches, Batches]:
    """Rows for fitting, and the rest: of each batch the last eighth, or of batches that cannot be cut every eighth."""
    fitted: list[Batch] = []
    held: list[Batch] = []
    for number, batch in enumerate(batches):
        rows = rows_of((batch.inputs, batch.mask))
        if rows is None:
            (fitted if fitted_rows(1, number) else held).append(batch)
            continue
        until = fitted_rows(rows, number)
        if until:
            fitted.append(cut(batch, slice(until)))
        if until < rows:
            held.append(cut(batch, slice(until, None)))
    if not held:
        held = fitted
    return Batches.read(fitted), Batches.read(held)


class Judge:
    """Compares networks with the dense one, which runs once.

    Attributes:
        dense: the model as it is.
        calibration: of the rows held out.
        passes: of other networks over these rows, so far.
    """

    def __init__(self, dense: nn.Module, calibration: Calibration) -> None:
        self.dense = dense
        self.calibration = calibration
        self.passes = 0
        self._wanted: dict[int, Wanted] = {}
        self._room = _KEPT

    def divergence(self, small: nn.Module) -> float:
        """The mean over all outputs that count; of logits the Kullback-Leibler divergence, else the squared difference.

        Infinite where it is not a number.
        """
        self.passes += 1
        total = count = 0.0
        with evaluating(self.dense), evaluating(small):
            for index, batch in enumerate(self.calibration.batches):
                here = batch.on(model_device(self.dense))
                each = divergences(self.calibration, self._wanted_on(index, here), small, here)
                total, count = total + float(each.sum()), count + each.numel()
        total, count = summed_over_processes(total, count)
        mean = total / max(1.0, count)
        return mean if mean == mean else float("inf")

    def _wanted_on(self, index: int, batch: Batch) -> Wanted:
        found = self._wanted.get(index)
        if found is None:
            found = wanted_on(self.calibration, self.dense, batch)
            self._room -= found.output.nbytes
            if self._room >= 0:
                self._wanted[index] = found
        return found
