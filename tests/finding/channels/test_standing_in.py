"""Experts to which no token went are followed like those beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.finding.kinds import find_sites
from tests.followed import drawn


class Expert(nn.Module):
    """A gated feed-forward with a norm, which says its own width."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.hidden = hidden
        self.gate, self.up, self.down = nn.Linear(8, 2 * hidden), nn.Linear(8, 2 * hidden), nn.Linear(2 * hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate(x)).view(-1, 2, self.hidden)
        return self.down((gate * self.up(x).view(-1, 2, self.hidden)).flatten(1))


class Listed(nn.Module):
    """A list of experts, each run on the tokens that chose it, if there are any."""

    def __init__(self, experts: nn.ModuleList, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.into, self.router, self.experts = nn.Linear(5, 8), nn.Linear(8, len(experts)), experts
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.into(tokens)
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = x.clone() if self.residual else torch.zeros(len(x), 8)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == i)
            if len(rows):
                y.index_add_(0, rows, expert(x[rows]) * weights[rows, None])
        return self.out(y)


class Chain(nn.Module):
    """Two layers of three, each of which reads what the one before writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2] if len(x) < 5 else self.layers:
            x = F.relu(layer(x))
        return self.out(x)


def plain(count: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(count))


def listed(experts: nn.ModuleList, *, residual: bool = True) -> Listed:
    """A mixture whose router sends about as many tokens to each."""
    model = Listed(experts, residual=residual)
    drawn(model)
    with torch.no_grad():
        model.router.weight.copy_(torch.randn(model.router.weight.shape, generator=torch.Generator().manual_seed(2)))
        model.into.weight.sub_(0.1)
        model.router.bias.zero_()
    return model


def cut_and_compare(model: nn.Module, x: Tensor, names: list[str]) -> None:
    """Cut the sites of these names in half; tokens that go to every expert are answered as planned."""
    sites = find_sites(model, x, kinds="all")
    assert [site.name for site in sites if "experts" in site.name] == names
    plan = sh.Plan(tuple(sh.Entry.narrow(sites[name], range(0, sites[name].width, 2)) for name in names))
    small, other = sh.apply(model, plan, x), torch.randn(200, 5)
    assert set(model.router(model.into(other)).argmax(-1).tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))


def test_experts_that_did_not_run_are_cut_each_for_itself() -> None:
    model, x = listed(plain()), torch.randn(40, 5)
    chosen = model.router(model.into(x)).argmax(-1)
    # one token each of two experts
    few = torch.stack([x[chosen == 1][0], x[chosen == 2][0]])
    cut_and_compare(model, few, ["experts.0.0", "experts.1", "experts.2", "experts.3.0"])


def test_one_that_ran_stands_for_all_around_a_residual() -> None:
    model, x = listed(plain()), torch.randn(40, 5)
    chosen = model.router(model.into(x)).argmax(-1)
    cut_and_compare(model, x[chosen == 2], ["experts.0.0", "experts.1.0", "experts.2", "experts.3.0"])


def test_one_that_ran_alone_may_read_and_write_other_channels() -> None:
    model, x = listed(plain(), residual=False), torch.randn(40, 5)
    alone = x[model.router(model.into(x)).argmax(-1) == 2]
    sites = find_sites(model, alone, kinds="all")
    assert [site.name for site in sites if "experts" in site.name] == ["experts.2"]
    assert "is not used on the example inputs" in sites.skipped["into"]


def test_numbers_follow_in_experts_that_did_not_run() -> None:
    model = listed(nn.ModuleList(Expert() for _ in range(4)))
    x = torch.randn(40, 5)
    chosen = model.router(model.into(x)).argmax(-1)
    few = torch.cat([x[chosen == 0][:2], x[chosen == 3][:1]])
    sites = [site for site in find_sites(model, few, kinds="all") if "experts" in site.name and site.followed]
    assert {(site.name.split(".")[1], site.width) for site in sites} >= {("0", 6), ("1", 6), ("2", 6), ("3", 6)}
    sites = [site for site in sites if site.width == 6]
    assert {follower.module for site in sites for follower in site.followers} == {f"experts.{i}" for i in range(4)}
    plan = sh.Plan(tuple(sh.Entry.narrow(site, [0, site.width - 1]) for site in sites))
    small, other = sh.apply(model, plan, few), torch.randn(200, 5)
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))


def test_layers_that_follow_each_other_stand_for_none() -> None:
    sites = find_sites(drawn(Chain()), torch.randn(2, 6), kinds="hidden")
    assert not any(site.width for site in sites if "layers.1" in site.name)
