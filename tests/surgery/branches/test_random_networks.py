"""Random residual networks lose random branches and layers, exactly."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.planning.costs import Cost, cost_after
from shallower.recording.tracing import trace_forward
from tests.residual import must_be_found, residual_network


def chosen(sites: sh.Sites, rng: random.Random) -> sh.Plan | None:
    """Some branches that do not contradict each other."""
    entries: list[sh.Entry] = []
    for site in rng.sample(list(sites), len(sites)):
        if len(entries) < 4 and rng.random() < 0.6:
            try:
                sh.Plan((*entries, sh.Entry.drop(site)))
            except sh.PlanError as error:
                if "goes with" not in str(error):
                    raise
            else:
                entries.append(sh.Entry.drop(site))
    return sh.Plan(tuple(entries)) if entries else None


def without(model: nn.Module, plan: sh.Plan) -> nn.Module:
    """What the plan means, by other means: the last maps of branches are zero, and layers are passed by."""
    other = copy.deepcopy(model)
    for entry in plan.entries:
        if entry.site.branch.layer:
            module = other.get_submodule(entry.site.branch.layer)
            module.forward = lambda x: x
            continue
        with torch.no_grad():
            for parameter in other.get_submodule(entry.site.branch.closing).parameters():
                parameter.zero_()
    return other


def bytes_of(model: nn.Module) -> int:
    held: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


def check(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    model, x, others = residual_network(seed)
    sites = sh.find_sites(model, x, kinds="branch")
    found = {site.branch.closing for site in sites} - {""}
    assert must_be_found(model) <= found, (must_be_found(model) - found, dict(sites.skipped))
    plan = chosen(sites, rng)
    if plan is None:
        return
    small = sh.apply(model, plan, x)
    simulated, meant = sh.simulate(model, plan), without(model, plan)
    for other in (x, *others):
        with torch.no_grad():
            torch.testing.assert_close(small(other), simulated(other))
            torch.testing.assert_close(small(other), meant(other))
    before, after = trace_forward(model, x), trace_forward(small, x)
    assert before.macs - after.macs == plan.macs_saved
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == plan.params_saved
    cost = cost_after(plan, Cost(0, before.macs, bytes_of(model)), model)
    assert (cost.macs, cost.size) == (after.macs, bytes_of(small))
    sh.save(small, folder / f"{seed}")
    again = sh.load(folder / f"{seed}", model=residual_network(seed)[0]).eval()
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
def test_many_random_networks(tmp_path: Path) -> None:
    for seed in range(60, 1000):
        check(seed, tmp_path)
