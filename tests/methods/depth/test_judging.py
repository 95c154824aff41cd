"""What is held out, and how far networks are from the dense one there."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from shallower.core.batches import Batches
from shallower.methods.depth.judging import Judge, set_apart
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.training.divergence import kl_divergence
from tests.methods.depth.networks import Residual, inputs


def test_one_row_in_eight_is_held_out() -> None:
    batches = Batches.read(inputs(count=5, rows=16))
    fitted, held = set_apart(batches)
    assert (fitted.rows, held.rows) == (70, 10)
    assert set(fitted.seen()) | set(held.seen()) == set(batches.seen())
    assert not set(fitted.seen()) & set(held.seen())


def test_of_single_rows_every_eighth_is_held_out() -> None:
    fitted, held = set_apart(Batches.read(inputs(count=16, rows=1)))
    assert (fitted.rows, held.rows) == (14, 2)


def test_so_few_rows_that_none_is_held_out_are_used_twice() -> None:
    fitted, held = set_apart(Batches.read(inputs(count=1, rows=3)))
    assert fitted.rows == held.rows == 3


def test_batches_that_cannot_be_cut_are_held_out_whole() -> None:
    batches = [(torch.randn(4, 3), torch.randn(5, 3)) for _ in range(8)]
    fitted, held = set_apart(Batches.read(batches, inputs_of=tuple))
    assert (len(fitted), len(held)) == (7, 1)


@pytest.mark.parametrize("logits", [True, False])
def test_the_divergence_is_the_mean_over_all_rows(logits: bool) -> None:
    model, batches = Residual((1, 1)).eval(), inputs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].down.weight.mul_(0.5)
    judge = Judge(model, Calibration(batches, SqueezeOptions(logits=logits)))
    assert judge.divergence(model) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        x = torch.cat(batches)
        wanted = (other(x) - model(x)).square().sum(-1).mean()
        if logits:
            wanted = kl_divergence(other(x), model(x))
    assert judge.divergence(other) == pytest.approx(float(wanted), rel=1e-5)
    assert judge.passes == 2


def test_what_is_not_a_number_is_infinitely_far() -> None:
    model = Residual((1, 1)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].down.weight.fill_(torch.nan)
    assert Judge(model, Calibration(inputs())).divergence(other) == math.inf
