"""Networks with branches out of use compute what their simulation does, and keep all names."""

from __future__ import annotations

import pytest
import torch

import shallower as sh
from shallower.methods.depth.emptying import emptied, inside
from tests.finding.branches.test_describing import Convolutions
from tests.methods.depth.networks import Residual, inputs, sites_of


@pytest.mark.parametrize("names", [("layers.1:layer",), ("layers.0.first:branch", "layers.2:layer")])
def test_an_emptied_network_is_the_simulated_one(names: tuple[str, ...]) -> None:
    model, batches = Residual((1, 1, 1), two=True), inputs()
    sites = sites_of(model, batches)
    chosen = [sites[name] for name in names]
    small = emptied(model, chosen)
    plan = sh.Plan(tuple(map(sh.Entry.drop, chosen)))
    with torch.no_grad():
        torch.testing.assert_close(small(batches[0]), sh.simulate(model, plan)(batches[0]))
        assert not torch.equal(model(batches[0]), small(batches[0]))
    assert [name for name, _ in small.named_modules()] == [name for name, _ in model.named_modules()]
    assert next(small.parameters()).data_ptr() == next(model.parameters()).data_ptr()


def test_a_strided_block_gives_zeros_of_its_own_size() -> None:
    model, x = Convolutions().eval(), torch.randn(2, 3, 8, 8)
    (site,) = sh.find_sites(model, x, kinds="branch")
    with torch.no_grad():
        wanted = sh.simulate(model, sh.Plan((sh.Entry.drop(site),)))(x)
        torch.testing.assert_close(emptied(model, [site])(x), wanted)


def test_what_is_inside_a_branch() -> None:
    model, batches = Residual((1, 1), two=True), inputs()
    sites = sites_of(model, batches)
    layer = sites["layers.1:layer"]
    within = [site.name for site in sites if inside(site, [layer])]
    assert within == [name for name in sites.names if name.startswith("layers.1") and name != layer.name]
    assert not inside(layer, [layer])
    assert not inside(layer, [sites["layers.1.first:branch"]])
