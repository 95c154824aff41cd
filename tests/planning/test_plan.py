"""Plans: what they check, and what they cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from shallower.errors import PlanError
from shallower.modules.site_parts import fingerprint
from shallower.planning.entries import Entry
from shallower.planning.forms import form_of
from shallower.planning.plan import CostWarning, Plan
from shallower.sites import Place
from shallower.surgery.applying import apply
from tests.planning.samples import N, fitted_plan, linear, model, site


def test_a_collapse_makes_every_channel_linear_with_slope_one():
    (entry,) = Plan.collapse([site()]).entries
    assert len(entry.linear) == N
    assert torch.equal(entry.slopes, torch.ones(N, dtype=torch.float64))
    assert not entry.offsets.any()


def test_a_collapse_can_be_of_some_names_only():
    second = site("other", producer=linear("4", 6, N), consumers=(linear("6", N, 5),))
    assert [e.site.name for e in Plan.collapse([site(), second], names=["other"]).entries] == ["other"]


def test_a_collapse_of_an_unknown_name_is_refused():
    with pytest.raises(PlanError, match="no site 'encoder'"):
        Plan.collapse([site()], names=["encoder"])


def test_a_site_that_cannot_be_linear_is_refused_with_its_reason():
    with pytest.raises(PlanError, match="no site may become linear: mlp: the consumer pads"):
        Plan.collapse([site(not_linear="the consumer pads")])


def test_two_entries_for_a_site_are_refused():
    with pytest.raises(PlanError, match="mlp: the plan has 2 entries"):
        Plan((Entry.collapse(site()), Entry.collapse(site())))


def test_two_entries_for_a_layer_are_refused():
    with pytest.raises(PlanError, match="`0` is already changed by the entry of `mlp`"):
        Plan((Entry.collapse(site()), Entry.collapse(site("other"))))


def test_sites_in_a_circle_are_refused():
    back = site("back", producer=linear("2", N, N), consumers=(linear("0", N, N),))
    there = site("there", producer=linear("0", N, N), consumers=(linear("2", N, N),))
    with pytest.raises(PlanError, match="circle"):
        Plan((Entry.collapse(there), Entry.collapse(back)))


def test_costs_of_a_collapse_are_those_of_the_merged_layer():
    entry = Entry.collapse(site())
    assert (form_of(entry).params, form_of(entry).macs) == (6 * 5 + 5, 4 * 6 * 5)
    assert Plan((entry,)).params_saved == site().params - 35
    assert Plan((entry,)).sites.names == (site().name,)


def test_a_plan_that_does_not_pay_is_warned_of():
    square = site(width=N, producer=linear("0", 24, N, bias=False), consumers=(linear("2", N, 24),))
    with pytest.warns(CostWarning, match="mlp: the plan leaves 600 parameters"):
        Plan.collapse([square])


def test_the_table_says_what_becomes_of_each_site():
    text = str(fitted_plan())
    assert "plan by test for 1 sites" in text
    assert "partial + path of 3" in text


def test_a_plan_for_other_weights_is_refused():
    original, other = model(), model()
    plan = Plan((Entry.collapse(site()),), fingerprint(original, [site()]))
    apply(original, plan, torch.randn(4, 6))
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    with pytest.raises(PlanError, match="made for other weights"):
        apply(other, plan, torch.randn(4, 6))


def test_weights_elsewhere_do_not_matter_to_a_plan():
    longer = model().append(nn.Linear(5, 5))
    before = fingerprint(longer, [site()])
    nn.init.zeros_(longer[3].weight)
    assert fingerprint(longer, [site()]) == before != ""


def test_a_meta_model_has_no_fingerprint():
    assert fingerprint(model().to("meta"), [site()]) == ""


def test_a_collapse_leaves_out_what_cannot_be_linear_and_lists_it() -> None:
    other = site("other", producer=linear("3", 6, N), consumers=(linear("4", N, 5),), activation=Place("5"))
    plan = Plan.collapse([site(), dataclasses.replace(other, not_linear="a depthwise convolution is between")])
    assert [entry.site.name for entry in plan.entries] == ["mlp"]
    assert dict(plan.left_out) == {"other": "a depthwise convolution is between"}
    assert "other: a depthwise convolution is between" in str(plan)


def test_a_collapse_of_a_name_that_cannot_be_linear_is_refused() -> None:
    with pytest.raises(PlanError, match="no channel may become linear: it pads"):
        Plan.collapse([site(not_linear="it pads")], ["mlp"])
