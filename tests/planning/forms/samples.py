"""Blocks of two convolutions, and plans for them."""

from __future__ import annotations

import torch
from torch import nn

from shallower.planning.entries import Entry, Fate
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from tests.networks import Block, _randomised

X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(n: int = 6, residual: bool = False, **second: object) -> nn.Module:
    torch.manual_seed(0)
    up, down = nn.Conv2d(4, n, 3, padding=1), nn.Conv2d(n, 4, **{"kernel_size": 3, "padding": 1, **second})
    return _randomised(Block(up, nn.ReLU(), down, nn.BatchNorm2d(n), nn.Identity(), residual), torch.float64)


def checked(model: nn.Module, plan: Plan) -> nn.Module:
    """The model after surgery, if it equals the simulation and costs what the plan says."""
    small = apply(model, plan, X)
    with torch.no_grad():
        expected = simulate(model, plan)(X)
        assert (small(X) - expected).norm() <= 1e-10 * expected.norm()
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert saved == plan.params_saved
    return small


def mixed(site: Site, **changes: object) -> Entry:
    """Half of the channels linear with slopes and offsets, half dropped with constants."""
    n = site.width
    fates = torch.full((n,), int(Fate.DROP))
    fates[::2] = Fate.LINEAR
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return Entry(site, fates, numbers[0], numbers[1], **changes)
