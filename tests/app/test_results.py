"""What a run leaves of numbers, read again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shallower.app.results import (
    CURVE,
    RESULT,
    Measured,
    Speed,
    Verdict,
    comparison,
    read_points,
    read_record,
    verdict_table,
)
from shallower.errors import CheckpointError


def result(model: str, score: float, params: int, method: str = "squeeze") -> dict[str, Any]:
    dense = {"score": 0.9, "params": 1000, "macs": 5000, "size": 4000, "latency": 0.01}
    small = {**dense, "score": score, "params": params}
    options = {"model": model, "data": "rows.csv", "method": method}
    speed = {"measured": 1.25, "spread": 0.01, "predicted": 2.0}
    return {"schema": 3, "options": options, "quality": "accuracy", "dense": dense, "small": small, "speed": speed}


def folder(path: Path, numbers: Any) -> Path:
    path.mkdir()
    (path / RESULT).write_text(json.dumps(numbers))
    return path


def test_each_original_stands_once_before_what_was_made_of_it(tmp_path: Path) -> None:
    folders = [
        folder(tmp_path / "a", result("one", 0.89, 500)),
        folder(tmp_path / "b", result("two", 0.88, 400)),
        folder(tmp_path / "c", result("one", 0.87, 300, "tlc")),
    ]
    lines = comparison({str(path): read_record(path) for path in folders}).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["one", *map(str, (folders[0], folders[2])), "two", str(folders[1])]
    assert lines[2].split()[1:4] == ["tlc", "87.00", "%"]
    assert lines[2].split()[-2:] == ["-70%", "1.25x"]


def test_certificates_are_compared_where_there_are_some(tmp_path: Path) -> None:
    divergence = {"value": 0.01, "low": 0.005, "high": 0.02}
    certificate = {"rows": 436, "divergence": divergence, "changed": 7, "bound": 0.0299438}
    numbers = {**result("one", 0.89, 500), "certificate": certificate}
    folders = [folder(tmp_path / "a", numbers), folder(tmp_path / "b", result("one", 0.87, 300))]
    records = {path.name: read_record(path) for path in folders}
    header, _, first, second = comparison(records).splitlines()
    assert "other answers" in header
    assert "1.61 %, at most 2.99 %" in first
    assert second.split()[-2:] == ["-70%", "1.25x"]


def test_different_machines_are_told(tmp_path: Path) -> None:
    numbers = result("one", 0.89, 500)
    records = {}
    for name in "ab":
        records[name] = read_record(folder(tmp_path / name, {**numbers, "machine": {"threads": name}}))
    assert "different machines" in comparison(records)


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        {},
        {**result("one", 0.9, 5), "schema": 99},
        {**result("one", 0.9, 5), "small": {"score": "high"}},
        {**result("one", 0.9, 5), "colour": "red"},
    ],
    ids=["list", "empty", "schema", "text for a number", "unknown key"],
)
def test_a_damaged_result_is_refused(tmp_path: Path, numbers: Any) -> None:
    with pytest.raises(CheckpointError, match=RESULT):
        read_record(folder(tmp_path / "a", numbers))


def test_a_damaged_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        read_points(tmp_path)
    for text in ("{", "{}", '{"points": [{"score": 1}]}', "[1]"):
        (tmp_path / CURVE).write_text(text)
        with pytest.raises(CheckpointError, match=r"is missing|is not|not readable"):
            read_points(tmp_path)


def test_the_table_of_a_verdict_has_predicted_and_measured_speed() -> None:
    dense, small = (Measured(0.5, n, 10 * n, 4 * n, n / 1e5) for n in (1000, 500))
    verdict = Verdict(dense, small, speedup=1.9, spread=0.1)
    assert verdict.predicted == 2
    assert verdict.speed == Speed(measured=1.9, spread=0.1, predicted=2)
    first, second = verdict.rows("accuracy", "net", "squeezed")
    assert first[:3] == ("net", "50.00 %", "1K")
    assert second[-2:] == ("2.00x", "1.90x")


def test_a_result_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    dense = {"score": 0.9, "params": 1000, "macs": 5000, "memory": 4000, "latency": 0.01}
    site = {"width": 8, "kept": 4, "becomes": "narrower", "rank": 0, "note": "held-out error 16.20%"}
    numbers = {**result("one", 0.89, 500), "schema": 2, "dense": dense, "small": dense, "sites": {"layer": site}}
    record = read_record(folder(tmp_path / "a", {**numbers, "rows": None, "example": "32 x 49", "calibrated": 64}))
    assert (record.small.size, record.rows, record.example) == (4000, {}, (32, 49))
    assert record.details == {"calibrated": 64}
    assert (record.sites[0].name, record.sites[0].kept) == ("layer", 4)
    assert record.sites[0].error == pytest.approx(0.162)
    point = {**dense, "label": "25%", "widths": {"layer": 4}, "test_score": 0.8}
    for data in ([point], {"schema": 1, "name": "accuracy", "points": [point]}):
        (tmp_path / "a" / CURVE).write_text(json.dumps(data))
        (read,) = read_points(tmp_path / "a")
        assert (read.size, read.score, read.reported) == (4000, 0.9, 0.8)


def test_a_speed_within_its_spread_is_noise() -> None:
    dense = small = Measured(0.5, 1000, 1000, 4000, 0.01)
    noisy = Verdict(dense, small, speedup=1.36, spread=0.74)
    assert noisy.is_noise
    assert str(noisy) == "~1.36x"
    assert "not beyond the noise" in verdict_table("accuracy", noisy.rows("accuracy", "net"))
    assert not Verdict(dense, small, speedup=1.36, spread=0.02).is_noise
    assert not Verdict(dense, small, speedup=0.5, spread=0.02).is_noise
