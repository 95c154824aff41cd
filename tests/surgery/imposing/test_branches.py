"""Dropped branches simulated on the original layers."""

from __future__ import annotations

import torch

import shallower as sh
from tests.finding.branches.test_describing import Block


def test_a_dropped_branch_adds_nothing_and_a_dropped_layer_changes_nothing() -> None:
    model, x = torch.nn.Sequential(Block(), Block()).eval(), torch.randn(2, 8)
    sites = sh.find_sites(model, x, kinds="branch")
    for name in ("0:branch", "0:layer"):
        simulated = sh.simulate(model, sh.Plan((sh.Entry.drop(sites[name]),)))
        assert torch.equal(simulated(x), model[1](x))
        assert len(list(simulated.parameters())) == len(list(model.parameters()))
