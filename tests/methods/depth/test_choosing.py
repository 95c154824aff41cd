"""Which branches go."""

from __future__ import annotations

import pytest

from shallower.errors import TargetError
from shallower.methods.depth.choosing import TRIED, Chooser
from shallower.methods.depth.judging import Judge
from shallower.methods.depth.saving import Layers, Savings
from shallower.methods.squeezing.calibration import Calibration
from shallower.planning.targets import Target
from tests.methods.depth.networks import Residual, inputs, sites_of


def chooser_of(model: Residual, goal: str | int) -> Chooser:
    batches = inputs()
    sites = sites_of(model, batches)
    savings: Savings | Layers = (
        Layers(goal) if isinstance(goal, int) else Savings(model, sites, Target.parse(goal), batches[0][:2])
    )
    branches = [site for site in sites if site.kind == "branch"]
    return Chooser(model, branches, Judge(model, Calibration(batches)), savings)


def names(chooser: Chooser) -> list[list[str]]:
    return [sorted(site.name for site in removed.sites) for removed in chooser.removals()]


def test_those_go_that_matter_least() -> None:
    found = names(chooser_of(Residual((1, 0.01, 1, 0.1)), 2))
    assert found == [["layers.1:layer"], ["layers.1:layer", "layers.3:layer"]]


def test_a_branch_goes_alone_where_the_other_matters() -> None:
    model = Residual((1, 1, 1), two=True)
    model.layers[1].first.down.weight.data.mul_(0.01)
    model.layers[1].first.down.bias.data.mul_(0.01)
    assert names(chooser_of(model, "macs:90%"))[-1] == ["layers.1.first:branch"]


def test_a_layer_takes_the_place_of_all_its_branches() -> None:
    model = Residual((1, 0.01, 1), two=True)
    assert names(chooser_of(model, "macs:67%"))[-1] == ["layers.1:layer"]


def test_what_need_not_go_stays() -> None:
    # a small branch goes first, and then one that is enough without it
    model = Residual((1, 1e-3, 1, 1))
    chooser = chooser_of(model, "macs:76%")
    assert names(chooser)[-1] == ["layers.1:layer"]


def test_the_passes_are_bounded() -> None:
    chooser = chooser_of(Residual((1, 0.5, 0.1, 1, 1, 0.3, 0.2, 1, 1)), 4)
    removed = list(chooser.removals())[-1]
    assert chooser.judge.passes <= len(chooser.branches) + 3 * TRIED
    assert f"{chooser.judge.passes} passes" in chooser.note(removed)
    assert "with the other 3" in chooser.note(removed)


def test_a_target_that_no_branch_meets_is_refused() -> None:
    with pytest.raises(TargetError, match=r"1\.0% would remain|remain, and the target asks for less"):
        names(chooser_of(Residual((1, 1)), 3))
