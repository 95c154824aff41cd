"""Reduced-rank regression beside kept channels, against data and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shallower.calibrating.grams import Gram
from shallower.calibrating.selection import eliminate, fit_error, ridge_fit
from shallower.errors import FitError
from shallower.methods.squeezing.linear_paths import eliminate_beyond, path, path_gains
from tests.networks import seeds

RIDGE = 1e-12
N, D_IN, D_OUT = 12, 5, 4


def samples(seed: int, rows: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, x and y of a hidden layer with rectified channels whose output has a linear part; and a weight of errors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(rows, D_IN) @ normal(D_IN, D_IN)
    z = (x @ normal(D_IN, N) + normal(N)).relu()
    y = z @ normal(N, D_OUT) + x @ normal(D_IN, D_OUT) + 0.1 * normal(rows, D_OUT)
    a = normal(D_OUT, D_OUT)
    return z, x, y, a @ a.T + torch.eye(D_OUT)


def root_of(metric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors * values.sqrt() @ vectors.T
    return root


def least_error(columns: Tensor, y: Tensor, root: Tensor) -> float:
    """The mean squared weighted error of the best affine fit."""
    centred = columns - columns.mean(0)
    target = (y - y.mean(0)) @ root
    fitted = centred @ torch.linalg.lstsq(centred, target, driver="gelsd").solution
    return float((target - fitted).square().sum() / len(y))


@given(seed=seeds, rank=st.integers(1, 4), k=st.integers(0, 8))
@settings(max_examples=25)
def test_no_other_path_of_that_rank_does_better(seed: int, rank: int, k: int) -> None:
    z, x, y, metric = samples(seed)
    root, kept = root_of(metric), torch.arange(k)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    down = path(moments, N, kept, rank, root, ridge=RIDGE)
    found = least_error(torch.cat([z[:, kept], x @ down.T], 1), y, root)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        near = down + 0.1 * down.norm() * torch.randn(down.shape, generator=generator, dtype=torch.float64)
        other = torch.randn(down.shape, generator=generator, dtype=torch.float64)
        for rival in (near, other):
            assert found <= least_error(torch.cat([z[:, kept], x @ rival.T], 1), y, root) + 1e-9


@given(seed=seeds)
@settings(max_examples=10)
def test_gains_are_what_the_path_takes_away_of_the_error(seed: int) -> None:
    z, x, y, metric = samples(seed)
    root = root_of(metric)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    elimination = eliminate(moments.zz[:N, :N], moments.zy[:N] @ root, ridge=RIDGE, keep=0)
    gains = path_gains(moments, elimination, root, ridge=RIDGE)
    whole = least_error(z, y, root)
    for i, k in enumerate(gains.widths.tolist()[:-1]):
        kept = elimination.kept(k)
        for rank in range(1, D_OUT + 1):
            down = path(moments, N, kept, rank, root, ridge=RIDGE)
            lost = least_error(torch.cat([z[:, kept], x @ down.T], 1), y, root) - whole
            expected = float(gains.errors[k] * (1 - gains.shares[i, rank]))
            assert lost == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(gains.errors[0]))


def test_a_partly_linear_output_is_split_into_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator, dtype=torch.float64)
    z = (x @ torch.randn(8, 24, generator=generator, dtype=torch.float64)).relu()
    linear = torch.randn(8, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 6, generator=generator, dtype=torch.float64
    )
    y = z[:, 10:14] @ torch.randn(4, 6, generator=generator, dtype=torch.float64) + x @ linear + 1.0
    joint = Gram.of(torch.cat([z, x], 1), y)
    moments, root = joint.centred(), torch.eye(6, dtype=torch.float64)
    # z alone says the linear part too: it takes its place away from the channels that matter
    elimination = eliminate(moments.zz[:24, :24], moments.zy[:24], ridge=RIDGE, keep=0)
    assert elimination.error(6) > 1e-2 * elimination.error(0)
    beyond = eliminate_beyond(moments, 24, root, ridge=RIDGE)
    k, rank, _ = path_gains(moments, beyond, root, ridge=RIDGE).best(6)
    kept = beyond.kept(4)
    assert (k, rank, kept.tolist()) == (4, 2, [10, 11, 12, 13])
    down = path(moments, 24, kept, 2, root, ridge=RIDGE)
    seen = joint.through(kept, 24, down).centred()
    weight = ridge_fit(seen.zz, seen.zy, RIDGE)
    assert fit_error(seen.zz, seen.zy, float(seen.yy.sum()), weight) < 1e-8 * float(seen.yy.sum())


@given(width=st.integers(1, N), price=st.sampled_from([1.0, 2 / 3, 0.5]), multiple=st.integers(1, 4), seed=seeds)
@settings(max_examples=40)
def test_a_split_costs_no_more_and_promises_no_more_error(width: int, price: float, multiple: int, seed: int) -> None:
    z, x, y, metric = samples(seed)
    root = root_of(metric)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    elimination = eliminate(moments.zz[:N, :N], moments.zy[:N] @ root, ridge=1e-6, keep=0)
    gains = path_gains(moments, elimination, root, ridge=1e-6, price=price)
    k, rank, error = gains.best(width, multiple)
    assert k >= 1
    assert k + price * rank <= width + 1e-9
    assert rank % multiple == 0
    assert rank == 0 or k % multiple == 0
    assert rank > 0 or k == width
    assert error <= elimination.error(width) * (1 + 1e-9)


def test_the_gram_matrix_seen_through_a_path_is_that_of_its_columns() -> None:
    z, x, y, _ = samples(3)
    kept, down = torch.tensor([1, 4, 7]), torch.randn(2, D_IN, dtype=torch.float64)
    found = Gram.of(torch.cat([z, x], 1), y).through(kept, N, down)
    wanted = Gram.of(torch.cat([z[:, kept], x @ down.T], 1), y)
    for name in ("mean_z", "mean_y", "zz", "zy", "yy"):
        torch.testing.assert_close(getattr(found.centred(), name), getattr(wanted.centred(), name))
    assert found.count == wanted.count


def test_a_path_without_anything_to_tell_is_not_taken() -> None:
    z, x, y, metric = samples(1)
    root = root_of(metric)
    moments = Gram.of(torch.cat([z, 0 * x], 1), y).centred()
    elimination = eliminate(moments.zz[:N, :N], moments.zy[:N] @ root, ridge=1e-6, keep=0)
    gains = path_gains(moments, elimination, root, ridge=1e-6)
    assert gains.best(6) == (6, 0, pytest.approx(elimination.error(6)))


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_no_path_has_is_an_error(rank: int) -> None:
    z, x, y, _ = samples(0)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    with pytest.raises(FitError, match=f"rank {rank}"):
        path(moments, N, torch.arange(3), rank, torch.eye(D_OUT, dtype=torch.float64), ridge=RIDGE)


def test_gains_need_the_order_of_all_channels() -> None:
    z, x, y, _ = samples(0)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    elimination = eliminate(moments.zz[:N, :N], moments.zy[:N], ridge=RIDGE, keep=2)
    with pytest.raises(FitError, match="all are needed"):
        path_gains(moments, elimination, torch.eye(D_OUT, dtype=torch.float64), ridge=RIDGE)


def test_too_few_data_for_the_ridge_are_an_error() -> None:
    z, x, y, _ = samples(0, rows=4)
    moments = Gram.of(torch.cat([z, x], 1), y).centred()
    with pytest.raises(FitError, match="not positive definite"):
        path(moments, N, torch.arange(12), 2, torch.eye(D_OUT, dtype=torch.float64), ridge=0.0)
