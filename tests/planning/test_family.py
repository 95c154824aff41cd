"""Every size of a model from one squeezing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from shallower.errors import PlanError, TargetError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_as_found
from shallower.planning.costs import cost_after
from shallower.planning.entries import Entry
from shallower.planning.family import Family, Member
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.surgery.applying import apply


def family() -> tuple[nn.Module, Family]:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)]
    model = nn.Sequential(*layers).eval()
    found = find_sites(model, torch.zeros(2, 8))
    sites = found.only(site for site in found if site.width == 32)
    before = cost_as_found(model, sites)
    members = []
    for width, divergence in ((24, 0.1), (16, 0.3)):
        plan = Plan(tuple(Entry.narrow(site, range(width)) for site in sites))
        members.append(Member(plan, cost_after(plan, before, model), divergence))
    return model, Family(tuple(members), before, sites.names)


def widths(plan: Plan) -> list[int]:
    return [len(entry.kept) for entry in plan.entries]


def test_a_size_between_two_members_has_sites_of_both() -> None:
    model, made = family()
    at = made.members[0].cost.params + made.members[1].cost.params
    plan = made.plan(model, f"params:{at // 2}")
    assert widths(plan) == [16, 16, 24, 24]
    x = torch.randn(3, 8)
    small = apply(model, plan, x)
    assert sum(p.numel() for p in small.parameters()) <= at // 2


def test_the_largest_member_is_mixed_with_the_whole_model() -> None:
    model, made = family()
    at = made.before.params - made.before.params // 20
    plan = made.plan(model, Target("params", "absolute", at))
    assert widths(plan) == [24]
    assert plan.entries[0].site.name == made.order[0]


def test_what_is_smaller_than_all_is_refused_and_so_is_what_must_be_measured() -> None:
    model, made = family()
    with pytest.raises(TargetError, match="the smallest of the 2 members has"):
        made.plan(model, "params:10%")
    for target in ("latency:2x", "drop:1%"):
        with pytest.raises(TargetError, match="has to be measured"):
            made.plan(model, target)


def test_a_family_is_read_as_it_was_written(tmp_path: Path) -> None:
    model, made = family()
    made.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert str(again) == str(made)
    assert again.order == made.order
    assert [m.cost for m in again] == [m.cost for m in made]
    assert widths(again.plan(model, "params:70%")) == widths(made.plan(model, "params:70%"))


def test_a_damaged_family_is_refused(tmp_path: Path) -> None:
    _, made = family()
    made.save(tmp_path / "family")
    with pytest.raises(PlanError, match=r"family\.json is missing"):
        Family.load(tmp_path)
    path = tmp_path / "family" / "family.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": 7}))
    with pytest.raises(PlanError, match="another version"):
        Family.load(tmp_path / "family")
    path.write_text(json.dumps({**data, "order": 3}))
    with pytest.raises(PlanError):
        Family.load(tmp_path / "family")
