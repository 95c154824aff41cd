"""Loops over experts and lists of them: entries go with the rows of the router."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.spaces import followed_sites
from shallower.finding.kinds import find_sites
from shallower.recording.tracing import trace_forward
from tests.followed import drawn

DENSE = ("stack", "sum", "unbound", "scattered")
ROUTED = ("routed", "one-hot", "sliced")


class Looped(nn.Module):
    """A mixture of six experts in a list, or in slices of parameters, run in one way or another."""

    def __init__(self, how: str, top: int = 2) -> None:
        super().__init__()
        self.how, self.top, self.count = how, top, 6
        self.into, self.router, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 3)
        if how == "sliced":
            self.up, self.down = nn.Parameter(torch.empty(6, 12, 8)), nn.Parameter(torch.empty(6, 8, 12))
        else:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(self.count)
            )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.into(tokens)
        shares = self.router(x).softmax(-1)
        weights, chosen = shares.topk(self.top)
        if self.how == "stack":
            y = (torch.stack([expert(x) for expert in self.experts], 1) * shares[..., None]).sum(1)
        elif self.how == "sum":
            y = sum(shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
        elif self.how == "unbound":
            y = torch.zeros_like(x)
            for share, expert in zip(shares.unbind(-1), self.experts, strict=True):
                y = y + share[:, None] * expert(x)
        elif self.how == "scattered":
            shares, y = torch.zeros_like(shares).scatter(1, chosen, weights), torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                y += expert(x) * shares[:, i].unsqueeze(-1)
        else:
            y = self.of_the_chosen(x, weights, chosen)
        return self.out(x + y)

    def of_the_chosen(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        if self.how == "one-hot":
            mask = F.one_hot(chosen, self.count).permute(2, 1, 0)
            for i in range(self.count):
                which, rows = torch.where(mask[i])
                y.index_add_(0, rows, self.experts[i](x[rows]) * weights[rows, which, None])
            return y
        for i in range(len(self.up) if self.how == "sliced" else len(self.experts)):
            rows, which = torch.where(chosen == i)
            y.index_add_(0, rows, self.expert(i, x[rows]) * weights[rows, which, None])
        return y

    def expert(self, i: int, x: Tensor) -> Tensor:
        if self.how == "sliced":
            return F.linear(F.gelu(F.linear(x, self.up[i])), self.down[i])
        return self.experts[i](x)


def spaces(model: nn.Module, x: Tensor) -> list[sh.Site]:
    """The experts' spaces, whether their forward is known to follow or not."""
    found, _ = followed_sites(Following(trace_forward(model, x)), ())
    return [each.site for each in found if each.site.kind == "experts"]


@pytest.mark.parametrize("how", [*DENSE, "routed", "sliced"])
def test_entries_go_with_the_rows_of_the_router(how: str, tmp_path: Path) -> None:
    model, x = drawn(Looped(how)), torch.randn(40, 5)
    (site,) = spaces(model, x)
    assert site.width == 6
    assert [listed.module for listed in site.lists] == ([] if how == "sliced" else ["experts"])
    plan = sh.Plan((sh.Entry.narrow(site, [1, 3, 4]),))
    small, other = sh.apply(model, plan, x), torch.randn(70, 5)
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert plan.params_saved == saved
    sh.save(small, tmp_path / "small")
    assert torch.equal(sh.load(tmp_path / "small", model=Looped(how)).eval()(other), small(other))


@pytest.mark.parametrize("how", [*DENSE, *ROUTED])
def test_the_forwards_of_loops_follow(how: str) -> None:
    model, x = drawn(Looped(how)), torch.randn(40, 5)
    (site,) = find_sites(model, x, kinds="experts")
    assert (site.kind, site.width, len(site.lists)) == ("experts", 6, how != "sliced")
    small, other = sh.apply(model, sh.Plan((sh.Entry.narrow(site, [0, 4]),)), x), torch.randn(70, 5)
    torch.testing.assert_close(small(other), sh.simulate(model, sh.Plan((sh.Entry.narrow(site, [0, 4]),)))(other))


@pytest.mark.parametrize("how", ["stack", "routed", "one-hot", "sliced"])
def test_everything_in_and_around_a_mixture_is_cut_in_half(how: str) -> None:
    model, x = drawn(Looped(how)), torch.randn(40, 5)
    sites = [site for site in find_sites(model, x, kinds="all") if site.width and site.branch is None]
    assert {site.kind for site in sites} >= {"experts"}
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(0, site.width, 2)) for site in sites))
    small, other = sh.apply(model, plan, x), torch.randn(70, 5)
    assert (small.into.out_features, small.router.out_features) == (4, 3)
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))


@pytest.mark.parametrize("how", ["scattered", "routed"])
def test_experts_lose_channels_and_go_in_one_plan(how: str, tmp_path: Path) -> None:
    model, x = drawn(Looped(how)), torch.randn(40, 5)
    (experts,) = spaces(model, x)
    hidden = [site for site in find_sites(model, x) if "experts" in site.name]
    assert len(hidden) == 6
    # each expert loses another number of channels, and every second goes
    plan = sh.Plan(
        (sh.Entry.narrow(experts, [0, 2, 5]), *(sh.Entry.narrow(s, range(i, 12)) for i, s in enumerate(hidden)))
    )
    small, other = sh.apply(model, plan, x), torch.randn(70, 5)
    assert [expert[0].out_features for expert in small.experts] == [12, 10, 7]
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))
    sh.save(small, tmp_path / "small")
    again = sh.load(tmp_path / "small", model=Looped(how)).eval()
    assert torch.equal(again(other), small(other))
    # and once more, in what was cut and loaded
    (rest,) = spaces(again, x)
    smaller = sh.apply(again, sh.Plan((sh.Entry.narrow(rest, [1, 2]),)), x)
    assert [expert[0].out_features for expert in smaller.experts] == [10, 7]
    sh.save(smaller, tmp_path / "smaller")
    assert torch.equal(sh.load(tmp_path / "smaller", model=Looped(how)).eval()(other), smaller(other))


class Unweighted(nn.Module):
    """Adds what all experts give, whatever the router says."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        return (made * self.router(x).softmax(-1)[..., None]).sum(1) + made.sum(1)


class Gated(nn.Module):
    """Weights its experts by sigmoids, among which nothing is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).sigmoid()
        return sum(gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Shifted(nn.Module):
    """Expert i + 1 for the tokens of row i."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i in range(3):
            (rows,) = torch.where(chosen == i)
            y.index_add_(0, rows, self.experts[(i + 1) % 3](x[rows]))
        return y


def test_what_is_added_up_of_all_experts_is_added_up_of_those_that_stay() -> None:
    model, x = drawn(Unweighted()), torch.randn(30, 8)
    (site,) = spaces(model, x)
    plan = sh.Plan((sh.Entry.narrow(site, [0, 2]),))
    small, other = sh.apply(model, plan, x), torch.randn(70, 8)
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))
    assert len(small.experts) == 2


@pytest.mark.parametrize("make", [Gated, Shifted])
def test_lists_that_are_not_chosen_from_stay(make: type[nn.Module]) -> None:
    assert spaces(drawn(make()), torch.randn(30, 8)) == []


def test_layers_one_after_the_other_are_no_list_of_experts() -> None:
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + F.relu(layer(x))
            return x

    assert Following(trace_forward(Chain(), torch.randn(2, 6))).turns.lists == {}
