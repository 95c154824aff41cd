"""Structural Dropout on the way of the command line."""

from __future__ import annotations

import pytest
import torch

from shallower.app.compression import preview, run_method
from shallower.app.runs.structural_dropout import StructuralDropoutRun, at_point, set_statistics, statistics
from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from tests.app.small import network, work


def test_all_widths_of_a_network_with_norms_are_measured_and_the_full_one_stays() -> None:
    result = run_method(work(normed=True), StructuralDropoutRun(points=3))
    points, files = result.outcome.points, result.outcome.files
    assert len(points) >= 2
    assert {point.norms for point in points} == set(files)
    widest = max(points, key=lambda point: point.params)
    assert widest.params == sum(p.numel() for p in result.model.parameters())
    # What BatchNorm measured for a point is that point's, not the saved network's.
    assert all(name in result.model.state_dict() for name in files[widest.norms])


def test_a_point_becomes_a_model_of_its_own() -> None:
    given = work()
    result = run_method(given, StructuralDropoutRun(points=3))
    smallest = min((known.point for known in result.outcome.points), key=lambda point: point.cost.params)
    x = torch.randn(4, 8)
    small, plan = at_point(result.model, find_sites(result.model, x), smallest, x)
    assert sum(p.numel() for p in small.parameters()) == smallest.cost.params
    assert len(plan) == 2
    with pytest.raises(MethodError, match="do not fit"):
        at_point(result.model, find_sites(result.model, x).select("0"), smallest, x)


def test_the_preview_is_the_smallest_width() -> None:
    plan, before, after = preview(work(), StructuralDropoutRun(lower_bound="50%"))
    assert {len(entry.kept) for entry in plan.entries} == {24}
    assert after.params < before.params


def test_statistics_fit_only_the_model_that_they_are_of() -> None:
    model = network(normed=True)
    values = {name: tensor + 1 for name, tensor in statistics(model).items()}
    set_statistics(model, values)
    assert torch.equal(statistics(model)["1.running_mean"], values["1.running_mean"])
    with pytest.raises(MethodError, match="another model"):
        set_statistics(network(), values)
