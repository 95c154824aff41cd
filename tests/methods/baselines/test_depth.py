"""Published ways to take layers away."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import shallower as sh
from tests.methods.depth.networks import Residual, inputs, sites_of


def gone(plan: sh.Plan) -> list[str]:
    return sorted(entry.site.name for entry in plan.entries if entry.site.branch is not None)


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
def test_layers_go_that_change_least(name: str) -> None:
    model, batches = Residual((1, 0.01, 1, 0.05)), inputs()
    plan = sh.baseline(name, model, sites_of(model, batches), batches, 2)
    assert gone(plan) == ["layers.1:layer", "layers.3:layer"]
    assert len(sh.apply(model, plan, batches[0]).layers) == 2
    assert len(plan.seen) == 6 * 32


def test_shortgpt_ranks_by_the_cosine_of_what_a_layer_reads_and_gives() -> None:
    model, batches = Residual((1, 1, 1)), inputs()
    scores, x = [], torch.cat(batches)
    with torch.no_grad():
        for layer in model.eval().layers:
            y = layer(x)
            scores.append(float((1 - F.cosine_similarity(x, y, dim=-1)).mean()))
            x = y
    plan = sh.baseline("shortgpt", model, sites_of(model, batches), batches, 1)
    assert gone(plan) == [f"layers.{scores.index(min(scores))}:layer"]


def test_blockpruner_takes_branches() -> None:
    model, batches = Residual((1, 1, 1), two=True), inputs()
    with torch.no_grad():
        model.layers[1].first.down.weight.mul_(0.01)
        model.layers[1].first.down.bias.mul_(0.01)
    plan = sh.baseline("blockpruner", model, sites_of(model, batches), batches, "macs:90%")
    assert gone(plan) == ["layers.1.first:branch"]


def test_replaceme_folds_the_best_linear_map_into_what_stands_before_the_cut() -> None:
    model, batches = Residual((1, 1, 0.3)), inputs()
    plan = sh.baseline("replaceme", model, sites_of(model, batches), batches, 1)
    (dropped,) = gone(plan)
    number = int(dropped[len("layers.")])
    before, x = model.layers[number - 1], torch.cat(batches)
    with torch.no_grad():
        for layer in model.layers[: number - 1]:
            x = layer(x)
        m = before(x) - x
        wanted = model.layers[number](before(x)) - x
        t = torch.linalg.lstsq(m.double(), wanted.double()).solution
    (fitted,) = [entry for entry in plan.entries if entry.fit is not None]
    assert fitted.site.name == f"layers.{number - 1}"
    torch.testing.assert_close(fitted.fit.consumers[0], t.T @ before.down.weight.double(), rtol=1e-3, atol=1e-3)
    assert len(sh.apply(model, plan, batches[0]).layers) == 2


def test_what_cannot_be_done_is_said() -> None:
    model, batches = Residual((1, 1)), inputs()
    sites = sites_of(model, batches)
    with pytest.raises(sh.TargetError, match="more would remain"):
        sh.baseline("shortgpt", model, sites, batches, 3)
    with pytest.raises(sh.TargetError, match="in a row"):
        sh.baseline("replaceme", model, sites, batches, 2)
    with pytest.raises(sh.MethodError, match="takes none away"):
        sh.baseline("flap", model, sites, batches, 1)
    with pytest.raises(sh.SiteError, match="no layer among"):
        sh.baseline("shortgpt", model, sh.find_sites(model, batches[0]), batches, 1)
