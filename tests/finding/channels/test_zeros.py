"""Sums over channels that are not zero when their weights are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels.zeros import REASON
from shallower.finding.kinds import find_sites
from tests.followed import drawn


class Summed(nn.Module):
    """A sum over channels after some function of them."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.a, self.b = nn.Linear(4, 6), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "f",
    [
        torch.relu,
        torch.tanh,
        lambda h: h * 2,
        lambda h: h / 3,
        lambda h: h**2,
        lambda h: torch.pow(h, exponent=3),
        lambda h: h.masked_fill(h > 1, 0.0),
    ],
)
def test_sums_of_what_is_zero_are_cut_exactly(f: Callable[[Tensor], Tensor]) -> None:
    model, x = drawn(Summed(f)), torch.randn(5, 4)
    (site,) = find_sites(model, x, kinds="hidden")
    plan = sh.Plan((sh.Entry.narrow(site, [0, 2, 5]),))
    small = sh.apply(model, plan, x)
    torch.testing.assert_close(small(x - 2), sh.simulate(model, plan)(x - 2))


@pytest.mark.parametrize(
    "f",
    [
        torch.cos,
        torch.sigmoid,
        lambda h: h + 1,
        lambda h: 1 / h,
        lambda h: 2**h,
        lambda h: h**0,
        lambda h: torch.where(h > 0, h, 2.0),
        lambda h: h.masked_fill(h > 0, 2.0),
    ],
)
def test_sums_of_what_is_not_are_those_of_the_channels_that_stay(f: Callable[[Tensor], Tensor]) -> None:
    model, x = drawn(Summed(f)), torch.randn(5, 4)
    (site,) = find_sites(model, x, kinds="hidden")
    assert [call.function for call in site.averages] == ["sum"]
    plan = sh.Plan((sh.Entry.narrow(site, [0, 2, 5]),))
    small = sh.apply(model, plan, x)
    expected = f(model.a(x)[:, [0, 2, 5]]).sum(-1, keepdim=True)
    torch.testing.assert_close(small(x), model.b(expected))


def test_an_input_that_is_added_is_not_zero() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(1, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.b((self.a(x) + t).relu().norm(dim=-1, keepdim=True))

    sites = find_sites(drawn(Shifted()), (torch.randn(5, 4), torch.tensor(-1.0)), kinds="hidden")
    assert REASON in sites.skipped["a"]


@pytest.mark.parametrize("f", [torch.relu, torch.sigmoid])
def test_scores_over_features_are_exact(f: Callable[[Tensor], Tensor]) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.b = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(f(self.q(x)) @ f(self.k(x)).transpose(-1, -2))

    model, x = drawn(Scores()), torch.randn(2, 5, 4)
    (site,) = find_sites(model, x, kinds="hidden")
    assert site.width == 6
    plan = sh.Plan((sh.Entry.narrow(site, [1, 2]),))
    torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))


def test_distances_need_both_sides_to_be_zero() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.centres = nn.Linear(4, 6), nn.Linear(3, 3), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.b(torch.cdist(self.a(x) + t, self.centres))

    sites = find_sites(drawn(Distances()), (torch.randn(5, 4), torch.tensor(0.0)), kinds="hidden")
    assert REASON in sites.skipped["a"]


def test_a_weight_that_is_computed_has_to_be_zero_or_left_out() -> None:
    class Mixed(nn.Module):
        def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.f = f
            self.a, self.mix = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).cos() @ self.f(self.mix)

    for f, count in ((torch.tanh, 0), (torch.sigmoid, 1)):
        model, x = drawn(Mixed(f)), torch.randn(5, 4)
        (site,) = find_sites(model, x, kinds="hidden")
        assert len(site.averages) == count
        plan = sh.Plan((sh.Entry.narrow(site, [1, 2, 4]),))
        torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))
