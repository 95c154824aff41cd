"""Bounds on rates, against published values and arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from shallower.certifying.bounds import changed_at_most, ratio_over_rows


@pytest.mark.parametrize("rows", [1, 10, 100, 3000])
def test_without_a_change_the_bound_has_a_closed_form(rows: int) -> None:
    assert changed_at_most(0, rows) == pytest.approx(1 - 0.05 ** (1 / rows), rel=1e-12)


@pytest.mark.parametrize(
    ("changed", "rows", "bound"),
    # quantiles of the beta distribution with changed + 1 and rows - changed, to ten digits
    [
        (1, 10, 0.3941633024),
        (5, 10, 0.7775588989),
        (9, 10, 0.9948838031),
        (2, 20, 0.2826185249),
        (7, 436, 0.0299438408),
        (500, 100000, 0.0053827308),
    ],
)
def test_the_bound_is_that_of_clopper_and_pearson(changed: int, rows: int, bound: float) -> None:
    assert changed_at_most(changed, rows) == pytest.approx(bound, rel=1e-8)


def test_where_every_row_changes_the_bound_says_nothing() -> None:
    assert changed_at_most(4, 4) == 1.0


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_bound_holds_as_often_as_it_says(rate: float) -> None:
    rows, held = 80, 0.0
    for changed in range(rows + 1):
        chance = math.comb(rows, changed) * rate**changed * (1 - rate) ** (rows - changed)
        held += chance * (changed_at_most(changed, rows) >= rate)
    assert 0.95 <= held < 0.999


def test_a_bootstrap_finds_the_spread_of_a_mean() -> None:
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    found = ratio_over_rows(values, torch.ones_like(values))
    assert found.value == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.15)


def test_a_bootstrap_leaves_the_random_state_as_it_is_and_finds_the_same_again() -> None:
    values = torch.arange(9.0, dtype=torch.float64)
    state = torch.get_rng_state()
    assert ratio_over_rows(values, values + 1) == ratio_over_rows(values, values + 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_without_anything_have_a_ratio_of_0() -> None:
    assert ratio_over_rows(torch.zeros(3).double(), torch.zeros(3).double()).value == 0
