"""How much of a network its sites can give, counted and applied."""

from __future__ import annotations

import torch
from torch import nn

import shallower as sh
from shallower.sites.showing import params_of_halves, table_of_sites


def test_what_remains_of_halves_is_what_the_surgery_leaves() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)),
        torch.randn(5, 4),
    )
    sites = sh.find_sites(model, x)
    plan = sh.Plan(tuple(sh.Entry.narrow(site, torch.arange(site.width // 2)) for site in sites))
    small = sh.apply(model.eval(), plan, x)
    assert params_of_halves(sites, sites.params) == sum(p.numel() for p in small.parameters())


def test_convolutions_with_norms_and_streams_are_counted_alike() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.n(self.a(x)).relu())

    torch.manual_seed(0)
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), *tail).eval()
    x = torch.randn(2, 3, 9, 9)
    sites = sh.find_sites(model, x, kinds=("hidden", "stream"))
    plan = sh.Plan(tuple(sh.Entry.narrow(site, torch.arange(site.width // 2)) for site in sites))
    small = sh.apply(model, plan, x)
    assert params_of_halves(sites, sites.params) == sum(p.numel() for p in small.parameters())


def test_a_site_that_runs_several_times_says_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = self.b(self.a(x).relu())
            return x

    sites = sh.find_sites(nn.Sequential(Twice(), nn.Linear(4, 2)), torch.randn(3, 4))
    assert " x2" in table_of_sites(sites)


def test_a_name_that_is_long_stands_alone_and_no_line_is_wider_than_a_hundred() -> None:
    outer: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    for _ in range(9):
        outer = nn.ModuleDict({"a_long_name_of_a_module": outer})
    deep = outer

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.within = deep

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.within
            while isinstance(inner, nn.ModuleDict):
                inner = inner["a_long_name_of_a_module"]
            return x + inner(x)

    sites = sh.find_sites(nn.Sequential(Deep(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
    lines = table_of_sites(sites, {}).splitlines()
    long = next(name for name in sites.names if len(name) > 100)
    assert long in lines
    assert max(len(line) for line in lines if line != long) < 100
