"""Curves: which points are worth having, which one a target picks, and what is written of them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import MethodError, TargetError
from shallower.planning.costs import Cost
from shallower.planning.curve import Curve, Point


def point(score: float, params: int, latency: float | None = None, macs: int | None = None) -> Point:
    cost = Cost(params, params * 10 if macs is None else macs, params * 4, latency)
    return Point(f"{params}", {"a": params, "b": 1}, score, cost)


def curve() -> Curve:
    return Curve((point(0.7, 25, 1.0), point(0.9, 100, 4.0), point(0.6, 50, 2.0), point(0.88, 60, 3.0)), "accuracy")


def test_points_come_with_falling_params() -> None:
    assert [p.cost.params for p in curve()] == [100, 60, 50, 25]
    assert curve().full.score == 0.9


def test_the_front_leaves_out_what_is_beaten() -> None:
    assert [p.cost.params for p in curve().front()] == [100, 60, 25]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(values: list[tuple[int, int, int]]) -> None:
    found = Curve(tuple(point(float(s), p, macs=m) for s, p, m in values))
    front = found.front()
    assert not any(a.beats(b) for a in front for b in front)
    assert all(p in front.points or any(q.beats(p) for q in front) for p in found)


@pytest.mark.parametrize(
    ("target", "params"),
    [("params:70%", 60), ("macs:2x", 25), ("memory:200B", 25), ("latency:3s", 60), ("drop:5%", 60), ("drop:0.25", 25)],
)
def test_a_target_picks_the_best_point_that_meets_it(target: str, params: int) -> None:
    assert curve().best(target).cost.params == params


def test_a_target_that_no_point_meets_says_how_far_they_go() -> None:
    with pytest.raises(TargetError, match=r"asks for 10.0% .* smallest point of the curve has 25.0%"):
        curve().best("params:10%")


def test_a_latency_that_was_not_measured_is_told() -> None:
    with pytest.raises(TargetError, match="needs measured latencies"):
        Curve((point(0.9, 100), point(0.8, 50))).best("latency:2x")


def test_a_curve_comes_back_from_its_file(tmp_path: Path) -> None:
    path = curve().save(tmp_path / "new" / "curve.json")
    assert Curve.load(path) == curve()
    cached = Curve((Point("full", {"a": 4}, 0.9, Cost(1, 2, 3, kv=64)),))
    assert Curve.load(cached.save(path)) == cached
    assert [p.name for p in path.parent.iterdir()] == ["curve.json"]


def test_a_table_has_a_column_for_every_site(tmp_path: Path) -> None:
    rows = list(csv.DictReader(curve().save(tmp_path / "curve.csv").read_text().splitlines()))
    assert [row["a"] for row in rows] == ["100", "60", "50", "25"]
    assert [float(row["latency"]) for row in rows] == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 9, "points": []}', '{"schema": 1, "points": []}', '{"schema": 1, "points": [3]}'],
)
def test_files_that_are_no_curve_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(MethodError):
        Curve.load(tmp_path / "curve.json")


def test_a_curve_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    data: Any = {**curve().to_json(), "schema": 1}
    for stored in data["points"]:
        stored["memory"] = stored.pop("size")
    (tmp_path / "curve.json").write_text(json.dumps(data))
    assert Curve.load(tmp_path / "curve.json") == curve()


def test_keys_of_others_are_passed_over(tmp_path: Path) -> None:
    data: Any = curve().to_json()
    data["points"][0]["chosen"] = True
    (tmp_path / "curve.json").write_text(json.dumps(data))
    assert Curve.load(tmp_path / "curve.json") == curve()


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(MethodError):
        Curve((point(math.nan, 3),))


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"as \.json or \.csv"):
        curve().save(tmp_path / "curve.txt")


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert curve().plot(tmp_path / "curve.png", by="latency").read_bytes()[1:4] == b"PNG"
    with pytest.raises(MethodError, match="choose params"):
        curve().plot(tmp_path / "curve.png", by="weight")


def test_a_plot_is_drawn_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "curve.svg"
    assert b"<svg" in curve().plot(picture).read_bytes()
    with pytest.raises(MethodError, match="cannot be written"):
        curve().plot(tmp_path / "curve.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_table_shows_every_point() -> None:
    lines = str(curve()).splitlines()
    assert len(lines) == 5
    assert "accuracy" in lines[0]
    assert "4000.00 ms" in lines[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("params", 1.5), ("params", -1), ("macs", 10**400), ("score", float("nan")), ("score", "x"), ("widths", [1])],
)
def test_a_hostile_point_is_refused(key: str, value: object) -> None:
    data = {"schema": 1, "name": "accuracy", "points": [point(0.5, 10).to_json()]}
    data["points"][0][key] = value
    with pytest.raises(MethodError, match=rf"curve\.points\[0\]\.{key}"):
        Curve.from_json(data)
