"""LayerCollapse on the way of the command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.app.compression import preview, run_method
from shallower.app.runs.layer_collapse import LayerCollapseRun
from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.planning.targets import Target
from tests.app.small import work


def test_as_few_sites_collapse_as_meet_the_target() -> None:
    plan, _, _ = preview(work("params:50%"), LayerCollapseRun(order="last-first"))
    assert [entry.site.name for entry in plan.entries] == ["2"]
    plan, _, _ = preview(work("params:5%"), LayerCollapseRun())
    assert len(plan) == 2


def test_sites_collapse_in_training() -> None:
    result = run_method(work("params:50%", epochs=12), LayerCollapseRun(strength=2.0, order="last-first"))
    assert result.outcome.details["collapsed"] == ["2"]
    assert result.outcome.note == "1 collapsed"


def test_sites_that_would_not_become_cheaper_are_named() -> None:
    model, x = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 48)), torch.randn(4, 48)
    with pytest.raises(SiteError, match="no site that can collapse and pays"):
        LayerCollapseRun().usable(find_sites(model, x), Target.parse("params:50%"))
