"""A width out of a network that was trained at all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shallower as sh
from shallower.app.compression import run_method
from shallower.app.jobs import record_of, write, write_result
from shallower.app.models import LoadedModel
from shallower.app.picking import pick_into
from shallower.app.results import read_record
from shallower.app.runs.squeeze import SqueezeRun
from shallower.app.runs.structural_dropout import StructuralDropoutRun
from shallower.errors import CheckpointError
from shallower.planning.targets import Target
from tests.app.small import network, work


def make_network() -> tuple[nn.Module, Any]:
    """A factory, as a person writes one."""
    return network(normed=True), work().batches.example


FACTORY = f"{__name__}:make_network"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress --method structural-dropout` wrote."""
    given, output = work(normed=True), tmp_path_factory.mktemp("all") / "all"
    result = run_method(given, StructuralDropoutRun(points=3))
    outcome = result.outcome
    options = {"model": FACTORY, "data": "rows", "method": "structural-dropout", "target": ""}
    record = record_of(result, options, seconds=1.0)
    loaded = LoadedModel(given.model, "")
    write(outcome.model, output, loaded, outcome.plan, record, points=outcome.points, files=outcome.files)
    return output


def test_the_widest_that_meets_the_target_is_written_with_its_own_numbers(trained: Path, tmp_path: Path) -> None:
    output = pick_into(trained, Target.parse("params:60%"), tmp_path / "small", original=FACTORY)
    record = read_record(tmp_path / "small")
    small = sh.load(tmp_path / "small", model=network(normed=True))
    params = sum(p.numel() for p in small.parameters())
    assert params == record.verdict.small.params <= 0.6 * record.verdict.dense.params
    assert output.data["options"]["picked_from"] == str(trained)
    points = json.loads((tmp_path / "small" / "curve.json").read_text())["points"]
    assert [point["params"] for point in points if point["chosen"]] == [params]


def test_the_quality_keeps_its_name_whatever_it_is(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "all"
    copied.mkdir()
    for path in trained.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    data = json.loads((copied / "result.json").read_text())
    (copied / "result.json").write_text(json.dumps({**data, "quality": "cosine"}))
    assert "cosine" in pick_into(copied, Target.parse("params:60%"), tmp_path / "small", original=FACTORY).text


@pytest.mark.parametrize("change", [{"method": "squeeze"}, {"length": "abc"}, {"length": 1e400}])
def test_a_result_that_cannot_be_picked_from_is_named(trained: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    copied = tmp_path / "all"
    copied.mkdir()
    for path in trained.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    data = json.loads((copied / "result.json").read_text())
    (copied / "result.json").write_text(json.dumps({**data, "options": {**data["options"], **change}}))
    with pytest.raises(CheckpointError):
        pick_into(copied, Target.parse("params:60%"), tmp_path / "small", original=FACTORY)
    assert not (tmp_path / "small").exists()


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What squeezing to several sizes wrote."""
    given, output = work("params:30%"), tmp_path_factory.mktemp("sizes") / "sizes"
    result = run_method(given, SqueezeRun(samples=96, sizes=3))
    options = {"model": FACTORY, "data": "rows", "method": "squeeze", "target": "params:30%"}
    write_result(result, output, LoadedModel(given.model, ""), record_of(result, options, seconds=1.0))
    return output


def test_another_size_of_a_squeezing_is_picked_without_data(squeezed: Path, tmp_path: Path) -> None:
    dense = network()
    whole = sum(p.numel() for p in dense.parameters())
    small = sh.pick(squeezed, "params:80%", tmp_path / "small", model=dense)
    params = sum(p.numel() for p in small.parameters())
    assert params <= 0.8 * whole
    record = read_record(tmp_path / "small")
    assert record.small.params == params
    assert record.options["picked_from"] == str(squeezed)
    saved = sh.load(tmp_path / "small", model=network())
    x = work().batches.example
    assert saved(x).equal(small(x))


def test_a_size_has_the_score_that_the_run_measured(squeezed: Path, tmp_path: Path) -> None:
    points = json.loads((squeezed / "curve.json").read_text())["points"]
    assert len(points) == 4
    sh.pick(squeezed, "params:30%", tmp_path / "small", model=network())
    assert read_record(tmp_path / "small").small.score == points[-1]["test_score"]


def test_what_cannot_be_picked_is_said(squeezed: Path, tmp_path: Path) -> None:
    with pytest.raises(sh.ModelError, match="give that model again"):
        sh.pick(squeezed, "params:50%")
    other = network()
    for weight in other.parameters():
        nn.init.normal_(weight)
    with pytest.raises(sh.PlanError):
        sh.pick(squeezed, "params:50%", model=other)
    with pytest.raises(sh.TargetError, match="the smallest point"):
        sh.pick(squeezed, "params:1%", model=network())
    assert not (tmp_path / "small").exists()
