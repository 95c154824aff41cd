"""The plots as specifications: what they draw, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from shallower.app.report import charts
from shallower.app.report.data import read_report
from shallower.app.results import SiteRow
from tests.app.report.test_page import saved


def test_names_lose_the_beginning_that_all_share() -> None:
    assert charts.short_names(["model.layers.0.mlp", "model.layers.1.mlp"]) == ["0.mlp", "1.mlp"]
    assert charts.short_names(["one.mlp"]) == ["one.mlp"]
    assert charts.short_names(["a", "a"]) == ["a", "a"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (SiteRow("s", width=96, kept=48, becomes="narrower"), "96 → 48 channels"),
        (SiteRow("s", kind="heads", width=12, kept=6, becomes="narrower"), "12 → 6 heads"),
        (SiteRow("s", becomes="merged"), "one linear map"),
        (SiteRow("s", becomes="something new"), "something new"),
    ],
)
def test_the_form_of_a_site_is_said_in_words(row: SiteRow, words: str) -> None:
    assert charts.becomes(row) == words


def test_the_shares_of_every_site_add_up(tmp_path: Path) -> None:
    report = read_report(saved(tmp_path))
    spec = charts.sites(report.sites)
    values = spec["layer"][0]["data"]["values"]
    for i in range(len(report.sites)):
        assert sum(value["share"] for value in values if value["site"].startswith(f"{i}|")) == pytest.approx(1)
    marks = spec["layer"][1]["data"]["values"]
    assert marks[0]["note"] == "96 → 48 channels, error 1.23%"


def test_an_activation_place_went_as_a_whole() -> None:
    assert charts.fates(SiteRow("s", kind="activation")) == (("kept", 0), ("made linear", 1), ("dropped", 0))


def test_the_axis_says_which_way_is_better(tmp_path: Path) -> None:
    assert "higher is better" in str(charts.curve(read_report(saved(tmp_path)), []))
    assert "lower is better" in str(charts.curve(read_report(saved(tmp_path, quality="perplexity")), []))
