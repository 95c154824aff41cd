"""What a report says, read from the files of a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shallower.app.report.data import read_report, source_in
from shallower.errors import ReportError
from tests.app.report.test_page import DENSE, POINTS, RESULT, SITES, saved


def test_the_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    report = read_report(saved(tmp_path))
    assert (report.before.params, report.after.params, report.speedup) == (1000, 600, 1.6)
    assert report.sites[0].error == 0.0123
    assert report.sites[1].error is None
    assert [point.label for point in report.curve] == [point["label"] for point in POINTS]
    assert report.method == "calibrated squeezing"


def test_a_healed_model_is_said_to_be(tmp_path: Path) -> None:
    options = {**RESULT["options"], "heal": 2}
    assert read_report(saved(tmp_path, options=options)).method == "calibrated squeezing and distillation"


def test_what_was_not_measured_is_not_told(tmp_path: Path) -> None:
    report = read_report(saved(tmp_path, speed=None, rows={}))
    assert report.speedup is None
    assert not {"Latency", "Quality (accuracy)"} & {what for what, _ in report.measured}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "2,000 rows were trained on."),
        ({"details": {"calibrated": 512}}, "512 of 2,000 training rows were calibrated on."),
        ({"rows": {"train": 90, "validation": 10, "test": None}}, "Measured on the 10 validation rows"),
        ({"quality": "perplexity"}, "Measured on 300 test blocks of text"),
    ],
)
def test_rows_are_counted_by_what_they_were_used_for(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    report = read_report(saved(tmp_path, **changes))
    assert text in dict(report.measured)[f"Quality ({report.quality})"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dense": {**DENSE, "params": 1e400}},
        {"dense": {**DENSE, "score": float("nan")}},
        {"small": None},
        {"speed": {"measured": 0}},
        {"sites": [{"name": "a", "params": [1, 2, 3]}]},
        {"sites": [SITES]},
        {"sites": {"a": {}}},
        {"rows": {"train": -1}},
        {"example": [99999999999, 5]},
        {"schema": 99},
        {"quality": None, "options": None},
    ],
)
def test_a_damaged_value_is_one_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match=r"result\.json"):
        read_report(saved(tmp_path, **changes))


def test_a_file_nested_without_end_is_one_error(tmp_path: Path) -> None:
    (saved(tmp_path) / "result.json").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(ReportError, match=r"result\.json"):
        read_report(tmp_path)


@pytest.mark.parametrize("point", [{"params": 1.5}, {"params": 1e400}, {"score": float("nan")}, {"macs": None}])
def test_a_damaged_point_is_one_error(tmp_path: Path, point: dict[str, Any]) -> None:
    saved(tmp_path)
    (tmp_path / "curve.json").write_text(json.dumps({"points": [{**POINTS[0], **point}]}))
    with pytest.raises(ReportError, match=r"curve\.json"):
        read_report(tmp_path)


def test_a_network_without_parameters_is_no_division_by_zero(tmp_path: Path) -> None:
    empty = {**DENSE, "params": 0, "macs": 0, "size": 0}
    from shallower.app.report.page import render

    assert "<html" in render(read_report(saved(tmp_path, dense=empty, small=empty)))


def test_the_source_is_read_from_what_describes_the_directory(tmp_path: Path) -> None:
    assert source_in(tmp_path, "timm:resnet18") == "timm:resnet18"
    assert source_in(tmp_path, "my.nets:make") == ""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert source_in(tmp_path, "") == "transformers:BertModel"
    (tmp_path / "shallower.json").write_text(json.dumps({"source": "torchvision:vgg16"}))
    assert source_in(tmp_path, "") == "torchvision:vgg16"
