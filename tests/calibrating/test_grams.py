"""Second moments against the samples kept whole."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shallower.calibrating.grams import Gram, ridge_error
from shallower.calibrating.selection import ridge_fit
from shallower.errors import FitError
from tests.networks import seeds


def samples(
    rows: int, n: int = 6, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, n, generator=generator) + torch.linspace(-2, 2, n)
    return z.to(dtype), torch.randn(rows, d, generator=generator).to(dtype)


def assert_same(one: Gram, other: Gram) -> None:
    assert one.count == other.count
    for name in ("mean_z", "mean_y", "zz", "zy", "yy"):
        torch.testing.assert_close(getattr(one.centred(), name), getattr(other.centred(), name))


@given(seed=seeds, cuts=st.lists(st.integers(0, 40), max_size=5), n=st.sampled_from([1, 6, 50, 300]))
def test_samples_in_parts_add_up_to_the_whole(seed: int, cuts: list[int], n: int) -> None:
    z, y = samples(40, n, seed=seed)
    ends = sorted(cuts)
    parts = [Gram.of(z[a:b], y[a:b]) for a, b in zip([0, *ends], [*ends, 40], strict=True)]
    assert_same(reduce(add, parts), Gram.of(z, y))


@given(rows=st.sampled_from([2, 5, 6, 7, 2000]), intercept=st.booleans())
def test_moments_are_those_of_the_samples(rows: int, intercept: bool) -> None:
    z, y = samples(rows)
    moments = Gram.of(z, y).centred(intercept)
    if intercept:
        z, y = z - z.mean(0), y - y.mean(0)
    torch.testing.assert_close(moments.zz, z.T @ z / rows)
    torch.testing.assert_close(moments.zy, z.T @ y / rows)
    torch.testing.assert_close(moments.yy, y.square().mean(0))
    torch.testing.assert_close(moments.squares, moments.zz.diagonal())


@pytest.mark.parametrize("rows", [3, 30])
def test_what_is_added_leaves_the_sums_before_as_they_were(rows: int) -> None:
    z, y = samples(rows)
    before, same = Gram.of(z, y), Gram.of(z, y)
    after = before.seen(z + 1, y)
    assert_same(before, same)
    assert after.count == 2 * rows
    z.zero_()
    assert_same(before, same)


def test_few_rows_of_many_columns_are_kept_as_rows() -> None:
    gram = Gram.of(*samples(4, n=50_000, d=2)) + Gram.of(*samples(4, n=50_000, d=2, seed=1))
    moments = gram.centred()
    assert moments.rows is not None
    assert moments.rows[0].shape == (8, 50_000)
    assert moments.fit(1e-3).shape == (2, 50_000)


@given(seed=seeds, ridge=st.sampled_from([1e-6, 1e-3, 1.0]), intercept=st.booleans())
def test_the_fit_from_rows_is_that_from_products(seed: int, ridge: float, intercept: bool) -> None:
    z, y = samples(12, n=30, seed=seed)
    held = Gram.of(*samples(5, n=30, seed=seed + 1)).centred(intercept)
    moments = Gram.of(z, y).centred(intercept)
    assert moments.rows is not None
    weight = ridge_fit(moments.zz, moments.zy, ridge)
    torch.testing.assert_close(moments.fit(ridge), weight, rtol=1e-5, atol=1e-7)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    missed = held.rows[1] - held.rows[0] @ weight.T if held.rows is not None else torch.empty(0)
    wanted = float((missed.square().sum(0) * weights).sum())
    assert ridge_error(moments, held, ridge, weights) == pytest.approx(wanted, rel=1e-5)
    assert held.error(weight, weights) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("rows", [4, 40])
def test_the_error_of_a_map_is_its_mean_square_on_the_samples(rows: int) -> None:
    z, y = samples(rows)
    weight, weights = torch.randn(3, 6, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    missed = (y - y.mean(0)) - (z - z.mean(0)) @ weight.T
    wanted = float((missed.square().mean(0) * weights).sum())
    assert Gram.of(z, y).centred().error(weight, weights) == pytest.approx(wanted)


@pytest.mark.parametrize("rows", [4, 40])
def test_columns_are_chosen_and_mapped_as_those_of_the_samples(rows: int) -> None:
    z, y = samples(rows)
    kept, down = torch.tensor([0, 3]), torch.randn(2, 2, dtype=torch.float64)
    gram = Gram.of(z, y)
    assert_same(gram.part(slice(1, 4)), Gram.of(z[:, 1:4], y))
    assert_same(gram.part(kept), Gram.of(z[:, kept], y))
    assert_same(gram.through(kept, 4, down), Gram.of(torch.cat([z[:, kept], z[:, 4:] @ down.T], 1), y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_in_float64(dtype: torch.dtype) -> None:
    z, y = samples(3000, dtype=dtype)
    assert_same(Gram.of(z, y), Gram.of(z.double(), y.double()))


def test_quick_products_are_nearly_the_same() -> None:
    z, y = samples(3000, dtype=torch.float32)
    quick, exact = Gram.of(z, y, quick=True).centred(), Gram.of(z, y).centred()
    torch.testing.assert_close(quick.zz, exact.zz, rtol=1e-5, atol=1e-5)


def test_no_rows_count_for_nothing() -> None:
    z, y = samples(10)
    gram = Gram.of(z, y)
    assert_same(gram.seen(z[:0], y[:0]), gram)
    assert_same(Gram.of(z[:0], y[:0]) + gram, gram)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_positions_are_refused(rows: int) -> None:
    with pytest.raises(FitError, match=f"only {rows} positions"):
        Gram.of(*samples(rows)).centred()


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(rows: int, value: float) -> None:
    z, y = samples(rows)
    y[1, 2] = value
    assert not Gram.of(z, y).is_finite()
    with pytest.raises(FitError, match="not finite"):
        Gram.of(z, y).centred()


def test_sums_of_other_columns_do_not_add_up() -> None:
    with pytest.raises(FitError, match="do not add up"):
        Gram.of(*samples(4)) + Gram.of(*samples(4, n=7))
    with pytest.raises(FitError, match="6 columns"):
        Gram.of(*samples(4)).seen(*samples(4, n=7))
