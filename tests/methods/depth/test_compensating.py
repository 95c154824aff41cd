"""What stays makes up for what went."""

from __future__ import annotations

import torch

import shallower as sh
from shallower.core.batches import Batches
from shallower.methods.depth.compensating import Refitting
from shallower.methods.depth.emptying import emptied
from shallower.methods.depth.judging import Judge, set_apart
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from tests.methods.depth.networks import Residual, inputs, sites_of


def refitting_of(model: Residual, *dropped: str, sensitivity: bool = True) -> Refitting:
    batches = inputs(count=8, rows=64)
    sites = sites_of(model, batches)
    fitted, held = set_apart(Batches.read(batches))
    options = SqueezeOptions(sensitivity=sensitivity)
    judge = Judge(model, Calibration(held, options))
    hidden = [site for site in sites if site.kind != "branch"]
    return Refitting(model, hidden, [sites[name] for name in dropped], Calibration(fitted, options), judge)


def test_the_sites_around_a_cut() -> None:
    refitting = refitting_of(Residual((1, 1, 1, 1, 1)), "layers.2:layer")
    assert {name: aim.name for name, aim in refitting.aims.items()} == {"layers.1": "layers.2"}
    assert [site.name for site in refitting.touched] == ["layers.1", "layers.3", "layers.4"]


def test_layers_that_go_together_are_one_cut() -> None:
    refitting = refitting_of(Residual((1, 1, 1, 1, 1)), "layers.1:layer", "layers.2:layer")
    assert {name: aim.name for name, aim in refitting.aims.items()} == {"layers.0": "layers.2"}


def test_without_a_site_before_the_cut_those_behind_are_fitted() -> None:
    refitting = refitting_of(Residual((1, 1, 1)), "layers.0:layer")
    assert refitting.aims == {}
    assert [site.name for site in refitting.touched] == ["layers.1", "layers.2"]


def test_refitting_brings_the_output_nearer() -> None:
    model = Residual((1, 1, 0.7, 1))
    refitting = refitting_of(model, "layers.2:layer")
    entries = refitting.entries()
    assert entries
    assert all("divergence on rows held out" in entry.note for entry in entries)
    dropped = [sh.Entry.drop(site) for site in refitting.dropped]
    x = torch.randn(512, 8)

    def away(*more: sh.Entry) -> float:
        with torch.no_grad():
            return float((sh.simulate(model, sh.Plan((*dropped, *more)))(x) - model(x)).square().mean())

    assert away(*entries) < 0.6 * away()


def test_a_last_site_before_the_cut_takes_on_what_went() -> None:
    # what goes reads the stream as it is, and adds a part of what the site before it has added
    model = Residual((1, 1))
    with torch.no_grad():
        model.layers[1].norm = torch.nn.Identity()
        model.layers[1].up.weight.mul_(1e-3)
        model.layers[1].up.bias.zero_()
        model.layers[1].down.weight.mul_(1e3)
    refitting = refitting_of(model, "layers.1:layer")
    (entry,) = refitting.entries()
    assert entry.site.name == "layers.0"
    assert len(entry.kept) == entry.site.width


def test_a_fit_that_does_not_help_is_left_out() -> None:
    model = Residual((1, 1, 1))
    refitting = refitting_of(model, "layers.1:layer")
    small = emptied(model, refitting.dropped)
    refitting.judge.divergence = lambda _: 1.0  # type: ignore[method-assign]
    assert refitting.entries() == []
    assert torch.equal(small(torch.ones(1, 8)), emptied(model, refitting.dropped)(torch.ones(1, 8)))
