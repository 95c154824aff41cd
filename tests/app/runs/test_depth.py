"""Fewer layers on the way of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shallower.app.compression import Work, run_method
from shallower.app.runs.depth import DepthRun
from shallower.errors import SiteError
from tests.app.small import work
from tests.methods.depth.networks import Residual


def residual(target: str, folder: Path | None = None) -> Work:
    """A network of four layers, one of which matters little, with a head."""
    model = nn.Sequential(Residual((1, 0.05, 1, 1)), nn.Linear(8, 3))
    torch.manual_seed(0)
    return replace(work(target, folder=folder), model=model.eval())


@pytest.mark.parametrize("target", ["macs:80%", "drop:20%"])
def test_layers_go_and_the_rest_is_refitted(target: str) -> None:
    result = run_method(residual(target), DepthRun(samples=96))
    assert "0.layers.1:layer" in result.outcome.details["gone"]
    assert len(result.outcome.model[0].layers) < 4
    assert result.verdict.small.macs < result.verdict.dense.macs


def test_healing_is_told() -> None:
    result = run_method(residual("macs:80%"), DepthRun(samples=96, heal=2))
    assert result.outcome.note == "healed"
    assert "healing" in result.outcome.details


def test_the_preview_is_the_plan() -> None:
    given = residual("macs:80%")
    run = DepthRun(samples=96)
    plan = run.preview(given, run.usable(run.find(given.model, given.example), given.target))
    assert [entry.site.name for entry in plan.entries if entry.site.branch is not None] == ["0.layers.1:layer"]


def test_a_network_without_branches_is_refused() -> None:
    with pytest.raises(SiteError, match="neither a branch nor a layer"):
        run_method(work("macs:80%"), DepthRun(samples=96))
