"""What all methods share on the way of `shallower compress`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shallower.app.batching import drawn_rows
from shallower.app.compression import cost_after, cost_of, preview, run_method, site_rows
from shallower.app.runs.layer_collapse import LayerCollapseRun
from shallower.app.runs.squeeze import SqueezeRun
from shallower.errors import SiteError, TargetError
from shallower.finding.kinds import find_sites
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from tests.app.small import batches, network, work


def test_a_result_meets_its_target_and_both_models_are_judged() -> None:
    given = work("params:60%")
    result = run_method(given, SqueezeRun(samples=96))
    dense, small = result.verdict.dense, result.verdict.small
    assert small.params == sum(p.numel() for p in result.model.parameters()) <= 0.6 * dense.params
    assert 0 <= small.score <= 1
    assert small.latency is not None
    assert small.latency > 0


def test_a_result_is_certified_on_test_rows() -> None:
    given = work("params:60%")
    result = run_method(given, SqueezeRun(samples=96))
    certificate = result.certificate
    assert certificate is not None
    assert (certificate.rows, certificate.left_out, result.uncertified) == (40, 0, "")
    assert len(result.outcome.plan.seen) == 96
    x = torch.cat([x for x, _ in given.batches.test])
    with torch.no_grad():
        differ = given.model(x).argmax(1) != result.model(x).argmax(1)
    assert certificate.changed == int(differ.sum())


def test_without_enough_test_rows_there_is_no_certificate() -> None:
    given = work("params:60%")
    few = DataLoader(TensorDataset(*given.batches.test.dataset[:10]), 40)
    for test, reason in ((given.batches.validation, "no test rows"), (few, "10 test rows are too few")):
        result = run_method(replace(given, batches=replace(given.batches, test=test)), SqueezeRun(samples=96))
        assert result.certificate is None
        assert reason in result.uncertified


def test_a_sample_of_the_test_rows_is_the_same_in_every_call() -> None:
    given = work()
    first = torch.cat([x for x, _ in drawn_rows(given.batches.test, 30, 0)])
    assert len(first) == 30
    assert torch.equal(first, torch.cat([x for x, _ in drawn_rows(given.batches.test, 30, 0)]))
    assert len(drawn_rows(given.batches.test, 10**6, 0).dataset) == 40  # type: ignore[arg-type]


def test_a_preview_changes_nothing() -> None:
    given = work("params:60%")
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    plan, was, then = preview(given, LayerCollapseRun())
    assert then.params == was.params - plan.params_saved <= 0.6 * was.params
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())


def test_rows_to_calibrate_on_do_not_depend_on_what_was_trained_before() -> None:
    data = batches()
    given = work()
    first = torch.cat([x for x, _ in given.sample(64)])
    list(data.train)
    assert torch.equal(first, torch.cat([x for x, _ in given.sample(64)]))
    list(given.batches.train)
    given.batches.train.generator.manual_seed(99)  # type: ignore[union-attr]
    assert torch.equal(first, torch.cat([x for x, _ in given.sample(64)]))
    assert given.batches.sample_size(50) == 64
    assert given.batches.sample_size(10**18) == 160


def test_sites_that_are_not_there_are_named() -> None:
    with pytest.raises(SiteError, match=r"--sites 'encoder\.\*'"):
        run_method(work("params:60%", sites="encoder.*"), SqueezeRun(samples=96))


def test_a_model_below_the_floor_is_refused_before_any_work() -> None:
    with pytest.raises(TargetError, match="the unchanged model"):
        run_method(work("params:60%", floor=1.0), SqueezeRun(samples=96))


def test_a_method_without_a_target_is_told_to_have_one() -> None:
    with pytest.raises(TargetError, match="--target"):
        _ = work().target


def test_the_unchanged_model_is_trained_first_if_asked_for(tmp_path: Path) -> None:
    trained = run_method(work("params:60%", folder=tmp_path, dense_epochs=6), SqueezeRun(samples=96))
    assert trained.verdict.dense.score > 0.6
    assert (tmp_path / "dense.safetensors").is_file()


def test_costs_are_counted_and_the_mode_of_the_model_stays() -> None:
    model, x = network().train(), torch.randn(4, 8)
    cost = cost_of(model, x)
    assert (cost.params, cost.macs) == (8 * 48 + 48 + 48 * 48 + 48 + 48 * 3 + 3, 4 * (8 * 48 + 48 * 48 + 48 * 3))
    assert model.training
    plan = Plan.collapse(find_sites(model, x))
    after, real = cost_after(plan, cost, model), cost_of(apply(model, plan, x), x)
    assert (after.params, after.macs) == (real.params, real.macs)


def test_the_table_of_sites_says_what_became_of_each() -> None:
    model, x = network(), torch.randn(4, 8)
    sites = find_sites(model, x)
    (row,) = site_rows(Plan.collapse(sites.select("0")))
    assert (row.name, row.width, row.linear, row.becomes) == ("0", 48, 48, "merged")
    assert isinstance(model, nn.Sequential)
