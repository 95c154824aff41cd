"""Elimination by the sum of several readers' errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shallower.calibrating.grams import Centred, Gram
from shallower.calibrating.joint import Part, eliminate_jointly
from shallower.calibrating.metrics import Metric
from shallower.calibrating.selection import columns_of, eliminate
from shallower.errors import FitError


def seen(rows: int = 200, columns: int = 12, outputs: int = 5, seed: int = 0) -> Centred:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=draw, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=draw, dtype=torch.float64
    )
    y = z @ torch.randn(columns, outputs, generator=draw, dtype=torch.float64)
    return Gram.of(z, y).centred()


def part(moments: Centred, columns: Tensor, scale: float = 1.0) -> Part:
    metric = Metric(torch.ones(len(moments.yy), dtype=torch.float64))
    return Part.of(moments.zz, moments.fit(1e-9), metric, ridge=1e-6, columns=columns, scale=scale)


@pytest.mark.parametrize("taps", [1, 3])
def test_of_one_reader_it_is_the_plain_elimination(taps: int) -> None:
    moments, n = seen(), 12 // taps
    found = eliminate_jointly([part(moments, columns_of(torch.arange(n), taps).view(n, taps))])
    plain = eliminate(moments.zz, moments.zy, ridge=1e-6, taps=taps)
    assert torch.equal(found.order, plain.order)
    torch.testing.assert_close(found.errors, plain.errors, rtol=1e-3, atol=1e-6)


def test_the_error_is_that_of_all_readers_fitted_to_what_stays() -> None:
    one, other = seen(seed=1), seen(seed=2)
    columns = torch.arange(12)[:, None]
    found = eliminate_jointly([part(one, columns), part(other, columns, scale=3.0)])
    kept = found.kept(7)
    expected = 0.0
    for moments, scale in ((one, 1.0), (other, 3.0)):
        left = Centred(
            moments.mean_z[kept], moments.mean_y, moments.yy, products=(moments.zz[kept][:, kept], moments.zy[kept])
        )
        expected += scale * left.error(left.fit(1e-6), torch.ones(5, dtype=torch.float64))
    assert found.error(7) == pytest.approx(expected, rel=1e-3)


def test_columns_of_no_channel_stay_and_are_fitted_with_the_others() -> None:
    moments = seen()
    few = eliminate_jointly([part(moments, torch.arange(6)[:, None])])
    assert few.channels == 6
    assert len(few.order) == 5
    all_gone = eliminate_jointly([part(moments, torch.arange(12)[:, None])])
    assert few.error(1) < all_gone.error(1)


def test_many_channels_go_several_at_a_time() -> None:
    moments = seen(rows=900, columns=600)
    found = eliminate_jointly([part(moments, torch.arange(600)[:, None])])
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist()))
    assert len(found.order) == 599
    assert bool((found.errors.diff() >= 0).all())


def test_without_a_reader_nothing_is_chosen() -> None:
    with pytest.raises(FitError, match="no layer reads"):
        eliminate_jointly([])
