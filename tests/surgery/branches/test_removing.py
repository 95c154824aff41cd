"""Dropped branches and layers: the result equals the simulation on other inputs, is saved, and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shallower as sh
from tests.finding.branches.test_describing import Block, Convolutions, Parallel


class Numbered(nn.Module):
    """Layers that know their number, of which a table is read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        for i, layer in enumerate(self.layers):
            layer.index = i

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            seen.append(layer.index)
            x = layer(x)
        assert seen == list(range(len(self.layers)))
        return x


def drop(sites: sh.Sites, *names: str) -> sh.Plan:
    return sh.Plan(tuple(sh.Entry.drop(sites[name]) for name in names))


def equal(model: nn.Module, small: nn.Module, plan: sh.Plan, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small(x), sh.simulate(model, plan)(x))


def test_a_layer_leaves_its_list_and_the_others_are_numbered_anew(tmp_path: Path) -> None:
    model, x = Numbered(5).eval(), torch.randn(2, 3, 8)
    sites = sh.find_sites(model, x, kinds="branch")
    plan = drop(sites, "layers.0:layer", "layers.3:layer", "layers.2:branch")
    small = sh.apply(model, plan, x)
    assert len(small.layers) == 3
    assert [layer.index for layer in small.layers] == [0, 1, 2]
    equal(model, small, plan, torch.randn(4, 2, 8))
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == plan.params_saved
    sh.save(small, tmp_path / "small")
    back = sh.load(tmp_path / "small", model=Numbered(5))
    assert torch.equal(back.eval()(x), small(x))
    # a second round on the result, and a third
    again = sh.apply(small, drop(sh.find_sites(small, x, kinds="branch"), "layers.0:layer"), x)
    sh.save(again, tmp_path / "again")
    assert torch.equal(sh.load(tmp_path / "again", model=Numbered(5)).eval()(x), again(x))


def test_of_a_list_of_several_classes_a_layer_passes_on_what_it_reads() -> None:
    model, x = nn.Sequential(Block(), nn.Linear(8, 8), Block()).eval(), torch.randn(2, 8)
    plan = drop(sh.find_sites(model, x, kinds="branch"), "2:layer")
    small = sh.apply(model, plan, x)
    assert len(small) == 3
    equal(model, small, plan, torch.randn(5, 8))


def test_a_branch_beside_a_projected_skip(tmp_path: Path) -> None:
    model, x = Convolutions().eval(), torch.randn(2, 3, 8, 8)
    plan = sh.Plan(tuple(map(sh.Entry.drop, sh.find_sites(model, x, kinds="branch"))))
    small = sh.apply(model, plan, x)
    equal(model, small, plan, torch.randn(1, 3, 7, 10))
    sh.save(small, tmp_path / "small")
    assert torch.equal(sh.load(tmp_path / "small", model=Convolutions()).eval()(x), small(x))


def test_plans_of_branches_are_saved_and_loaded(tmp_path: Path) -> None:
    model, x = Numbered(3).eval(), torch.randn(2, 3, 8)
    plan = drop(sh.find_sites(model, x, kinds="branch"), "layers.1:layer")
    plan.save(tmp_path / "plan")
    loaded = sh.Plan.load(tmp_path / "plan")
    assert loaded.to_json() == plan.to_json()
    assert torch.equal(sh.apply(model, loaded, x)(x), sh.apply(model, plan, x)(x))


def test_widths_and_branches_in_one_plan() -> None:
    model, x = Numbered(3).eval(), torch.randn(2, 3, 8)
    sites = sh.find_sites(model, x, kinds=("hidden", "branch"))
    hidden = [site for site in sites if site.kind != "branch"]
    entries = [sh.Entry.narrow(hidden[0], range(5)), sh.Entry.narrow(hidden[2], range(3))]
    plan = sh.Plan((sh.Entry.drop(sites["layers.1:layer"]), *entries))
    small = sh.apply(model, plan, x)
    assert [layer.up.out_features for layer in small.layers] == [5, 3]
    equal(model, small, plan, torch.randn(4, 2, 8))


def test_what_contradicts_itself_is_refused() -> None:
    model, x = Numbered(3).eval(), torch.randn(2, 3, 8)
    sites = sh.find_sites(model, x, kinds=("hidden", "branch"))
    with pytest.raises(sh.PlanError, match=r"goes with `layers.1:layer`, which the plan drops"):
        drop(sites, "layers.1:layer", "layers.1:branch")
    hidden = next(site for site in sites if site.kind != "branch")
    with pytest.raises(sh.PlanError, match=r"goes with `layers.0:branch`"):
        sh.Plan((sh.Entry.narrow(hidden, range(4)), sh.Entry.drop(sites["layers.0:branch"])))
    with pytest.raises(sh.PlanError, match="leave it out of the plan to keep it"):
        sh.Entry.narrow(sites["layers.0:branch"], [0])
    with pytest.raises(sh.PlanError, match="only a branch or a layer is dropped as a whole"):
        sh.Entry.drop(hidden)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_networks_and_random_branches(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kinds = data.draw(st.lists(st.sampled_from([Block, Parallel]), min_size=2, max_size=5))
    model, x = nn.Sequential(*(kind() for kind in kinds)).eval(), torch.randn(2, 8)
    sites = sh.find_sites(model, x, kinds="branch")
    chosen: list[sh.Site] = []
    for site in data.draw(st.lists(st.sampled_from(list(sites)), min_size=1, unique_by=lambda site: site.name)):
        parts = {name.split(".")[0] for name in site.layers}
        taken = [other for other in chosen if parts & {name.split(".")[0] for name in other.layers}]
        layers = any(other.branch.layer for other in (site, *taken))
        same = any(set(site.layers) & set(other.layers) for other in taken)
        if not (taken and layers) and not same:
            chosen.append(site)
    if len({name for site in chosen for name in site.layers if site.branch.layer}) == len(kinds):
        chosen.pop()
    if not chosen:
        return
    plan = sh.Plan(tuple(map(sh.Entry.drop, chosen)))
    small = sh.apply(model, plan, x)
    equal(model, small, plan, torch.randn(3, 8))
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == plan.params_saved
