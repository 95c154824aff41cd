"""The modules of a site, and the hash of their tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.modules.site_parts import fingerprint, parts_of
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply


class Block(nn.Module):
    """A residual around two convolutions with a depthwise one between, and a BatchNorm in front of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12)
        self.act1 = nn.PReLU(12)
        self.between, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.act2 = nn.PReLU()
        self.project, self.bn3 = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.act2(self.bn2(self.between(self.act1(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(z))


def block() -> tuple[Block, Sites, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 4, 6, 6)
    return model, find_sites(model, x), x


def test_a_site_consists_of_its_maps_norms_and_activations_and_of_the_norm_in_front_of_its_sum() -> None:
    model, sites, _ = block()
    assert set(parts_of(model, sites)) == {name for name, _ in model.named_children()}


@pytest.mark.parametrize("name", [name for name, _ in Block().state_dict().items()])
def test_every_tensor_of_a_site_changes_its_fingerprint(name: str) -> None:
    model, sites, _ = block()
    before = fingerprint(model, sites)
    with torch.no_grad():
        model.state_dict()[name].add_(1)
    assert fingerprint(model, sites) != before


def test_a_plan_does_not_fit_a_model_with_another_norm_between() -> None:
    model, sites, x = block()
    long = next(site for site in sites if site.between)
    plan = Plan((Entry.narrow(long, range(6)),), fingerprint(model, [long]))
    apply(model, plan, x)
    with torch.no_grad():
        model.bn2.weight.mul_(2)
    with pytest.raises(PlanError, match="fingerprints differ"):
        apply(model, plan, x)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU])
def test_what_a_method_attaches_does_not_change_the_fingerprint(activation: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 16), activation(), nn.Linear(16, 4))
    sites = find_sites(model, torch.randn(2, 4))
    before = fingerprint(model, sites)
    method = LayerCollapse(model, sites)
    assert fingerprint(model, sites) == before
    method.detach()
    assert fingerprint(model, sites) == before


def test_a_model_without_a_module_of_the_site_is_refused() -> None:
    model, sites, _ = block()
    del model.act1
    with pytest.raises(PlanError, match="no module `act1`"):
        parts_of(model, sites)
