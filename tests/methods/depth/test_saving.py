"""What goes with a branch, in every unit."""

from __future__ import annotations

import pytest

import shallower as sh
from shallower.measuring.cost import cost_of
from shallower.methods.depth.saving import Layers, Savings
from shallower.planning.targets import Target
from tests.methods.depth.networks import Residual, inputs, sites_of


@pytest.mark.parametrize("unit", ["params", "macs", "size"])
def test_counted_savings_are_those_of_the_model_without_the_branch(unit: str) -> None:
    model, batches = Residual((1, 1, 1)), inputs()
    sites, example = sites_of(model, batches), batches[0][:2]
    savings = Savings(model, sites, Target.parse(f"{unit}:50%"), example)
    layer = sites["layers.1:layer"]
    small = sh.apply(model, sh.Plan((sh.Entry.drop(layer),)), example)
    before, after = getattr(cost_of(model, example), unit), getattr(cost_of(small, example), unit)
    assert savings.whole == before
    assert savings.of(layer) == before - after
    assert savings.needed([layer]) == after - before / 2


def test_a_latency_is_timed_once_for_branches_alike() -> None:
    model, batches = Residual((1, 1, 1), width=512, hidden=4096), inputs(count=1, width=512)
    sites = sites_of(model, batches)
    savings = Savings(model, sites, Target.parse("latency:1.2x"), batches[0])
    layers = [site for site in sites if site.name.endswith(":layer")]
    assert len({savings.of(site) for site in layers}) == 1
    assert savings.left(layers) < savings.left(layers[:1])
    assert savings.left(layers) < 0.5 * savings.whole
    assert savings.left(layers) == savings.left(layers[::-1])


def test_layers_are_counted() -> None:
    model, batches = Residual((1, 1, 1), two=True), inputs()
    sites = sites_of(model, batches)
    savings = Layers(2)
    assert savings.of(sites["layers.1:layer"]) == 1
    assert savings.of(sites["layers.1.first:branch"]) == 0
    assert savings.needed([sites["layers.1:layer"]]) == 1
