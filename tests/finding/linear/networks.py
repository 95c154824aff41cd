"""Small networks in which sites are looked for, and what is found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shallower.finding.kinds import find_sites
from shallower.sites import Site, Sites


class Mlp(nn.Module):
    """Two linear layers; what happens between them is given."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], width: int = 12, **modules: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, width), nn.Linear(12, 8)
        for name, module in modules.items():
            self.add_module(name, module)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return x + self.fc2(self.between(self, self.fc1(x)))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def only_site(model: nn.Module, inputs: Any) -> Site:
    sites = linear(model, inputs)
    assert len(sites) == 1, str(sites)
    return sites[0]


def linear(model: nn.Module, inputs: Any) -> Sites:
    """The sites whose channels may become linear; the reasons of all others are among those of what was skipped."""
    sites = find_sites(model, inputs)
    others = {site.name: str(site.bridge.not_linear) for site in sites if site.followed}
    return sites.only((site for site in sites if not site.followed), others)


def reason(model: nn.Module, inputs: Any) -> str:
    sites = linear(model, inputs)
    assert not sites, str(sites)
    assert sites.skipped, "nothing was skipped"
    return " | ".join(sites.skipped.values())


def hooked(name: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model
