"""Column subset selection against brute force."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shallower.calibrating.selection import columns_of, eliminate, eliminate_rows, fit_error, ridge_fit, ridged
from shallower.errors import FitError
from tests.networks import seeds

RIDGE = 1e-6


def moments(n: int, d: int, seed: int, rows: int = 200, taps: int = 1) -> tuple[Tensor, Tensor, float]:
    """Second moments of correlated z and of a y that is nearly linear in it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z = normal(rows, n * taps) @ normal(n * taps, n * taps)
    y = z @ normal(n * taps, d) + normal(rows, d)
    return z.T @ z / rows, z.T @ y / rows, float((y * y).sum() / rows)


def ridge_error(zz: Tensor, zy: Tensor, kept: Tensor, taps: int = 1) -> float:
    """What ridge regression minimises, up to a constant, with the whole matrix's ridge."""
    columns = columns_of(kept, taps)
    q = ridged(zz, RIDGE)[columns][:, columns]
    return -float((zy[columns] * torch.linalg.solve(q, zy[columns])).sum())


@given(seed=seeds)
@settings(max_examples=20)
def test_each_elimination_removes_what_is_missed_least(seed: int) -> None:
    zz, zy, _ = moments(8, 3, seed)
    found = eliminate(zz, zy, ridge=RIDGE, block=3)
    base = ridge_error(zz, zy, torch.arange(8))
    for k in range(7, 0, -1):
        before = found.kept(k + 1)
        errors = [ridge_error(zz, zy, before[before != j]) for j in before]
        assert found.kept(k).tolist() == before[before != before[min(range(k + 1), key=errors.__getitem__)]].tolist()
        assert found.error(k) == pytest.approx(min(errors) - base, rel=1e-6)


@given(seed=seeds)
@settings(max_examples=10)
def test_channels_with_several_columns_go_as_one(seed: int) -> None:
    zz, zy, _ = moments(6, 2, seed, taps=4)
    found = eliminate(zz, zy, ridge=RIDGE, taps=4, block=8)
    base = ridge_error(zz, zy, torch.arange(6), 4)
    for k in range(5, 0, -1):
        before = found.kept(k + 1)
        errors = [ridge_error(zz, zy, before[before != j], 4) for j in before]
        assert found.error(k) == pytest.approx(min(errors) - base, rel=1e-6)


@given(seed=seeds, taps=st.sampled_from([1, 3]))
@settings(max_examples=20)
def test_elimination_from_rows_is_that_from_their_products(seed: int, taps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(5, 12 * taps, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rows = eliminate_rows(z, y @ y.T, ridge=1e-2, keep=2, taps=taps)
    products = eliminate(z.T @ z, z.T @ y, ridge=1e-2, keep=2, taps=taps)
    torch.testing.assert_close(rows.errors, products.errors, rtol=1e-6, atol=1e-9 * float(products.errors[-1]))
    assert torch.equal(rows.order, products.order)


def test_a_weight_of_errors_is_taken_as_products() -> None:
    zz, zy, _ = moments(8, 3, seed=2)
    weight = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    weighted = eliminate(zz, zy, ridge=1e-4, gain=lambda w: w @ weight @ w.T)
    torch.testing.assert_close(weighted.errors, eliminate(zz, zy @ weight.sqrt(), ridge=1e-4).errors)


def test_elimination_is_near_the_best_of_all_subsets() -> None:
    zz, zy, _ = moments(10, 3, seed=5)
    best = min(ridge_error(zz, zy, torch.tensor(subset)) for subset in combinations(range(10), 5))
    kept = eliminate(zz, zy, ridge=RIDGE).kept(5)
    whole = ridge_error(zz, zy, torch.arange(10))
    assert ridge_error(zz, zy, kept) - whole <= 1.5 * (best - whole)


def test_gathered_updates_change_nothing() -> None:
    zz, zy, _ = moments(40, 5, seed=1)
    one, many = (eliminate(zz, zy, ridge=1e-4, block=block) for block in (1, 64))
    assert torch.equal(one.order, many.order)
    torch.testing.assert_close(one.errors, many.errors)


def test_constant_and_repeated_channels_go_first_and_cost_nothing() -> None:
    zz, zy, _ = moments(6, 2, seed=2)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    zz, zy = zz[index][:, index], zy[index]
    zz[0], zz[:, 0], zy[0] = 0, 0, 0
    found = eliminate(zz, zy, ridge=1e-8)
    assert set(found.order[:2].tolist()) <= {0, 5, 6}
    assert 0 in found.order[:2].tolist()
    assert found.error(5) < 1e-6 * found.error(1)


def test_a_dead_hidden_tensor_is_eliminated_without_error() -> None:
    found = eliminate(torch.zeros(4, 4), torch.zeros(4, 2), ridge=1e-3)
    assert found.errors.tolist() == [0.0] * 4


def test_fit_recovers_a_linear_map_and_its_error() -> None:
    zz, zy, yy = moments(5, 3, seed=3)
    weight = ridge_fit(zz, zy, ridge=0.0)
    torch.testing.assert_close(weight @ zz, zy.T)
    assert fit_error(zz, zy, yy, weight) == pytest.approx(yy - float((zy * torch.linalg.solve(zz, zy)).sum()))


def test_moments_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    zz, zy, _ = moments(4, 2, seed=4)
    with pytest.raises(FitError, match="not finite"):
        eliminate(zz * torch.nan, zy, ridge=1e-3)
    with pytest.raises(FitError, match="not finite"):
        ridge_fit(zz, zy * torch.inf, 1e-3)
    with pytest.raises(FitError, match="shapes"):
        eliminate(zz, zy[:3], ridge=1e-3)
    with pytest.raises(FitError, match="positive definite"):
        eliminate(-zz, zy, ridge=1e-3)
    with pytest.raises(FitError, match="cannot stay"):
        eliminate(zz, zy, ridge=1e-3, keep=3).kept(2)


def test_a_width_of_1536_takes_seconds() -> None:
    zz, zy, _ = moments(1536, 384, seed=0, rows=2000)
    start = time.process_time()
    eliminate(zz, zy, ridge=1e-4, keep=768)
    assert time.process_time() - start < 20


def test_ten_thousand_outputs_take_seconds() -> None:
    zz, _, _ = moments(512, 1, seed=0, rows=1000)
    zy = torch.randn(512, 10_240, dtype=torch.float64)
    start = time.process_time()
    eliminate(zz, zy, ridge=1e-4, keep=256)
    assert time.process_time() - start < 10
