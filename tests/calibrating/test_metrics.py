"""The weight of errors against its matrix."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from shallower.calibrating.grams import Gram
from shallower.calibrating.metrics import Metric
from shallower.calibrating.selection import eliminate


def metric_and_matrix(rows: int) -> tuple[Metric, Tensor]:
    torch.manual_seed(0)
    plain = torch.rand(7, dtype=torch.float64) + 0.1
    gradients = [torch.randn(rows, d, dtype=torch.float64) for d in (4, 3)]
    blocks = tuple(Gram.of(g).centred(intercept=False) for g in gradients)
    matrix = torch.block_diag(*(g.T @ g / rows for g in gradients)) + torch.diag(plain)
    return Metric(plain, blocks), matrix


@pytest.mark.parametrize("rows", [2, 50])
def test_gain_diagonal_and_root_are_those_of_the_matrix(rows: int) -> None:
    metric, matrix = metric_and_matrix(rows)
    y = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(metric.gain(y), y @ matrix @ y.T)
    torch.testing.assert_close(metric.diagonal, matrix.diagonal())
    torch.testing.assert_close(metric.root @ metric.root.T, matrix)


def test_without_blocks_only_the_plain_weights_count() -> None:
    metric = Metric(torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert metric.diagonal.tolist() == [1, 4]
    assert metric.root.tolist() == [[1, 0], [0, 2]]
    assert metric.gain(torch.ones(1, 2, dtype=torch.float64)).tolist() == [[5]]


@pytest.mark.parametrize("rows", [5, 400])
def test_elimination_is_that_of_weighted_outputs(rows: int) -> None:
    metric, matrix = metric_and_matrix(50)
    z, y = torch.randn(rows, 40, dtype=torch.float64), torch.randn(rows, 7, dtype=torch.float64)
    moments = Gram.of(z, y).centred()
    found = metric.elimination(moments, ridge=1e-2)
    wanted = eliminate(moments.zz, moments.zy @ torch.linalg.cholesky(matrix), ridge=1e-2, keep=0)
    torch.testing.assert_close(found.errors, wanted.errors, rtol=1e-6, atol=1e-8)


def test_ten_thousand_outputs_take_seconds() -> None:
    torch.manual_seed(0)
    d = 10_240
    gradients = Gram.of(torch.randn(300, d)).centred(intercept=False)
    metric = Metric(torch.ones(d, dtype=torch.float64), (gradients,))
    moments = Gram.of(torch.randn(600, 256), torch.randn(600, d)).centred()
    start = time.process_time()
    metric.elimination(moments, ridge=1e-4, keep=128)
    assert time.process_time() - start < 10
