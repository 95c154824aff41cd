"""Which methods use a site is what they themselves use."""

from __future__ import annotations

import pytest
import torch
import torchvision.models as tv
from torch import nn

import shallower as sh
from shallower.errors import ShallowerError
from shallower.methods.offered import LEGEND, LETTERS, OFFERED, lettered, offered


class Network(nn.Module):
    """A layer that narrows what it reads, one that widens it, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 64), nn.Linear(64, 8)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head((x + self.b(self.a(x).relu())).relu())


def test_each_method_accepts_the_sites_that_it_is_said_to_use() -> None:
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(400, 6)
    sites = sh.find_sites(model, x, kinds="all")
    uses = offered(sites)
    assert set(uses) == set(sites.names)
    assert uses["up"] == OFFERED  # from 8 to 64 and back: one layer of 8 is cheaper
    narrow = [name for name, methods in uses.items() if "tlc" in methods and "layer-collapse" not in methods]
    assert narrow, uses
    for site in sites:
        one = sites.select(site.name)
        if "squeeze" in uses[site.name]:
            sh.squeeze(model, one, [x], target="params:99%")
        else:
            with pytest.raises(ShallowerError):
                sh.squeeze(model, one, [x], target="params:99%")
        if "structural-dropout" in uses[site.name]:
            sh.StructuralDropout(model, one).detach()
        else:
            with pytest.raises(ShallowerError):
                sh.StructuralDropout(model, one)
        if "tlc" in uses[site.name]:
            sh.TillLayersCollapse(model, one, batches=[x]).detach()
        else:
            with pytest.raises(ShallowerError):
                sh.TillLayersCollapse(model, one, batches=[x])


def test_letters_are_those_of_the_legend() -> None:
    for letter, method in zip(LETTERS, OFFERED, strict=True):
        assert f"{letter} {method}" in LEGEND
    with torch.device("meta"):
        sites = sh.find_sites(tv.resnet18(), torch.zeros(1, 3, 32, 32), kinds="all")
    letters = lettered(sites)
    assert letters["layer1.0"] == "STD"  # two 3x3 convolutions are cheaper than one 5x5
    assert {letters[site.name] for site in sites if site.kind == "activation"} == {"T"}
