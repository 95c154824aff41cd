"""Distances between outputs, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shallower.training.divergence import counted, kl_at_positions, kl_divergence, relative_divergence


def test_kl_is_torchs_and_zero_of_equal_logits() -> None:
    given, wanted = torch.randn(5, 7), torch.randn(5, 7)
    expected = F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl_divergence(given, wanted), expected)
    assert float(kl_divergence(given, given + 3)) == pytest.approx(0, abs=1e-6)


def test_a_temperature_divides_logits_and_multiplies_by_its_square() -> None:
    given, wanted = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(kl_divergence(given, wanted, temperature=2.0), 4 * kl_divergence(given / 2, wanted / 2))


def test_relative_error_is_the_squared_error_over_the_size() -> None:
    assert float(relative_divergence(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))) == pytest.approx(4 / 17)
    assert float(relative_divergence(torch.zeros(2), torch.zeros(2))) == 0


def test_padding_counts_for_nothing() -> None:
    values = torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert counted(values, mask).tolist() == [0, 1, 3]
    assert counted(values, torch.ones(4)) is values


def test_half_precision_is_computed_in_float32_and_double_in_double() -> None:
    half = torch.randn(3, 4).bfloat16()
    assert kl_divergence(half, half).dtype == torch.float32
    assert kl_divergence(half.double(), half.double()).dtype == torch.float64


def test_a_class_that_is_impossible_to_both_adds_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, -torch.inf, 0.1]])
    assert torch.equal(kl_at_positions(logits, logits), torch.zeros(2))
