"""A plan fits the model that it was made for, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.modules.site_parts import fingerprint
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.surgery.checking import check_fits

X = torch.randn(3, 4)


def mlp(width: int = 8, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width, bias), nn.ReLU(), nn.Linear(width, 2))


def plan_for(model: nn.Module, printed: bool = False) -> Plan:
    sites = find_sites(model, X)
    marks = fingerprint(model, sites) if printed else ""
    return Plan(tuple(Entry.narrow(site, torch.arange(3)) for site in sites), marks)


def test_a_plan_fits_its_own_model_and_one_with_other_weights_of_the_same_sizes() -> None:
    check_fits(mlp(), plan_for(mlp()))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 8)), "has no module"),
        (mlp(9), "made for output width 8"),
        (mlp(bias=False), "with a bias"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Linear(8, 2)), "is a Conv2d"),
    ],
)
def test_another_model_is_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        check_fits(model, plan_for(mlp()))


def test_a_plan_that_depends_on_weights_is_refused_for_others() -> None:
    model = mlp()
    plan = plan_for(model, printed=True)
    check_fits(model, plan)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(PlanError, match="fingerprints differ"):
        check_fits(model, plan)
