"""The report: what it says, and that its slider works in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shallower.app.report import charts
from shallower.app.report import page as page_module
from shallower.app.report.data import read_report
from shallower.app.report.page import write_report
from shallower.errors import ReportError
from tests.browser import browser, wait_until

__all__ = ["browser"]

DENSE = {"score": 0.9, "params": 1000, "macs": 4000, "size": 4000, "latency": 0.02}
SMALL = {"score": 0.88, "params": 600, "macs": 2000, "size": 2400, "latency": 0.0125}
SITES = [
    {
        "name": "layer.0.mlp",
        **{"kind": "feed-forward", "width": 96, "kept": 48, "linear": 0, "dropped": 48, "becomes": "narrower"},
        **{"params": [500, 250], "macs": [2000, 1000], "error": 0.0123, "note": "cheap"},
    },
    {
        "name": "layer.1.mlp",
        **{"kind": "feed-forward", "width": 96, "kept": 0, "linear": 96, "dropped": 0, "becomes": "merged"},
        **{"params": [500, 350], "macs": [2000, 1000]},
    },
]
RESULT: dict[str, Any] = {
    "schema": 3,
    "options": {
        "model": "models/tiny-bert",
        "data": "reviews.csv",
        "method": "squeeze",
        "target": "params:60%",
        "seed": 3,
    },
    "quality": "accuracy",
    "dense": DENSE,
    "small": SMALL,
    "speed": {"measured": 1.6, "predicted": 2.0, "spread": 0.03},
    "sites": SITES,
    "rows": {"train": 2000, "validation": 200, "test": 300},
    "machine": {"processor": "a CPU", "threads": 1, "torch": "2.13.0", "python": "3.11", "shallower": "0.1.0"},
}
CERTIFICATE = {
    "rows": 300,
    "changed": 4,
    "bound": 0.0303,
    "divergence": {"value": 0.01, "low": 0.005, "high": 0.02},
}
POINTS = [
    {"label": "width 24", "score": 0.80, "params": 400, "macs": 1500, "size": 1600, "latency": 0.009},
    {"label": "width 48", **SMALL, "chosen": True},
    {"label": "width 64", "score": 0.87, "params": 700, "macs": 2600, "size": 2800, "latency": 0.015},
    {"label": "width 80", "score": 0.895, "params": 800, "macs": 3200, "size": 3200, "latency": 0.017},
]


def saved(directory: Path, *, curve: bool = True, **changes: Any) -> Path:
    """A directory with the numbers of a result."""
    (directory / "result.json").write_text(json.dumps({**RESULT, **changes}))
    if curve:
        (directory / "curve.json").write_text(json.dumps({"schema": 2, "name": "accuracy", "points": POINTS}))
    return directory


def text_of(page: Path) -> str:
    """What a reader sees of it, without markup, styles and scripts."""
    body = page.read_text().partition("<body>")[2].partition("<script")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_a_certificate_has_a_section_of_its_own(tmp_path: Path) -> None:
    text = text_of(write_report(saved(tmp_path, certificate=CERTIFICATE)))
    assert "How often the answer changes Of 300 rows 4 get another answer" in text
    (tmp_path / "without").mkdir()
    text = text_of(write_report(saved(tmp_path / "without", details={"uncertified": "5 test rows are too few"})))
    assert "How often the answer changes" not in text
    assert "Not certified: 5 test rows are too few." in text


def test_the_page_answers_in_order(tmp_path: Path) -> None:
    text = text_of(write_report(saved(tmp_path)))
    headings = ["What you got", "The curve", "Where it came from", "How it was measured", "How to use it"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "60% of the parameters, 50% of the MACs, 1.60 times as fast" in text
    assert "accuracy 88.00 %, was 90.00 % (-2.00 points)" in text
    assert "Measured on 300 test rows that no choice was based on" in text
    assert "1.23%" in text
    assert "one linear map" in text


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = write_report(saved(tmp_path)).read_text()
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=|@import|url\(", markup)
    assert len(page) < 1_500_000


def test_there_is_no_curve_where_the_method_has_none(tmp_path: Path) -> None:
    page = write_report(saved(tmp_path, curve=False))
    assert "The curve" not in text_of(page)


def test_a_curve_is_chosen_by_one_score_and_reported_by_another(tmp_path: Path) -> None:
    points = [{**point, "test_score": point["score"] - 0.05} for point in POINTS]
    (saved(tmp_path) / "curve.json").write_text(json.dumps({"points": points}))
    first = read_report(tmp_path).curve[0]
    assert (round(first.reported, 3), first.score) == (0.75, 0.80)


def test_a_model_of_all_widths_is_one_point_at_the_full_width(tmp_path: Path) -> None:
    page = write_report(saved(tmp_path, small={**DENSE, "score": 0.89})).read_text()
    rows = page.partition('<table id="curve-table">')[2].partition("</table>")[0]
    assert rows.count("<tr data-index") == 4
    assert "89.00 %" in rows
    assert "the model as it was" not in rows


def test_every_plot_has_its_numbers_in_a_table(tmp_path: Path) -> None:
    page = write_report(saved(tmp_path)).read_text()
    for plot, table in (("curve", "curve-table"), ("sites", "sites-table")):
        assert re.search(rf'id="{plot}" [^>]*aria-describedby="{table}"', page)
        assert f'<table id="{table}">' in page
    curve_table = page.partition('<table id="curve-table">')[2].partition("</table>")[0]
    for value in ("width 24", "80.00 %", "400", "1.6KB", "9 ms"):
        assert value in curve_table


def test_without_the_plotting_package_there_are_tables_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "library", lambda: None)
    page = write_report(saved(tmp_path)).read_text()
    assert "pip install &#39;shallower[report]&#39;" in page or "pip install 'shallower[report]'" in page
    assert "<details open>" in page
    assert 'id="curve"' not in page


def test_a_perplexity_is_shown_as_people_read_it(tmp_path: Path) -> None:
    dense, small = {**DENSE, "score": -1.5}, {**SMALL, "score": -1.6}
    text = text_of(write_report(saved(tmp_path, curve=False, quality="perplexity", dense=dense, small=small)))
    assert "perplexity 4.953, was 4.482 (+0.471)" in text


def test_names_from_files_are_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    options = {**RESULT["options"], "model": evil}
    page = write_report(saved(tmp_path, options=options, sites=[{**SITES[0], "name": evil}])).read_text()
    assert "<script>alert" not in page


def test_the_code_names_the_place_where_the_directory_will_be(tmp_path: Path) -> None:
    assert "sh.load(&#39;out/small&#39;" in write_report(saved(tmp_path), at="out/small").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", None, "there is no result.json"),
        ("result.json", "{", "not readable as JSON"),
        ("result.json", "[]", "is not an object"),
        ("result.json", json.dumps({"options": {"model": "x"}}), "`quality` is missing"),
        ("result.json", json.dumps({**RESULT, "dense": {**DENSE, "params": "many"}}), r"dense\.params: 'many' is not"),
        ("curve.json", '{"points": 3}', "3 is not an object"),
        ("curve.json", '[{"label": "x"}]', "`score` is missing"),
    ],
)
def test_a_damaged_result_is_an_error_and_leaves_no_page(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_speed_within_the_noise_is_not_claimed(tmp_path: Path) -> None:
    text = text_of(write_report(saved(tmp_path, speed={"measured": 1.36, "spread": 0.74})))
    assert "not faster beyond the noise" in text
    assert "1.36x as fast, within the noise" in text
    assert "times as fast" not in text


def test_a_template_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "headline", lambda _: page_module.StrictUndefined(name="headline"))
    with pytest.raises(ReportError, match=r"the report's template failed \(page\.html, line \d+\): UndefinedError"):
        write_report(saved(tmp_path))


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    assert read_report(saved(tmp_path)).speedup == 1.6


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def page(tmp_path: Path, browser: Any) -> Any:
    """The report, open in a browser, its plots drawn."""
    pytest.importorskip("vl_convert")
    browser.get(write_report(saved(tmp_path), at="small").as_uri())
    wait_until(browser, "document.querySelector('#curve svg') && document.querySelector('#sites svg')")
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def shown(page: Any) -> str:
    text: str = page.find_element("id", "shown").text
    return text


def command(page: Any) -> str:
    text: str = page.find_element("id", "command").text
    return text


def slide(page: Any, key: str, times: int) -> None:
    slider = page.find_element("id", "budget")
    slider.send_keys(key * times)


def test_the_slider_starts_at_the_saved_model(page: Any) -> None:
    assert shown(page).startswith("width 48 (saved)")
    assert command(page) == "# this one lies in small"


def test_the_slider_moves_and_the_point_and_the_command_follow(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    slide(page, Keys.ARROW_LEFT, 20)
    assert shown(page).startswith("width 24")
    assert command(page) == "shallower pick small --target params:400 --output small-params-400"
    slide(page, Keys.END, 1)
    assert shown(page).startswith("the model as it was")
    slide(page, Keys.ARROW_LEFT, 10)
    assert shown(page).startswith("width 80")
    assert "params:800" in command(page)


def test_a_worse_point_that_costs_more_is_never_shown(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    seen = set()
    slide(page, Keys.HOME, 1)
    for _ in range(20):
        slide(page, Keys.ARROW_RIGHT, 10)
        seen.add(shown(page).split("\n")[0])
    assert "width 64" not in seen
    assert {"width 48 (saved)", "width 80"} <= seen


def test_the_budget_can_be_in_another_unit(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelector('input[name=unit][value=latency]').click()")
    assert shown(page).startswith("width 48 (saved)")
    slide(page, Keys.HOME, 1)
    assert command(page) == "shallower pick small --target latency:9ms --output small-latency-9ms"
    assert "at most 9 ms" in page.find_element("id", "budget-told").text


def test_hovering_a_point_tells_its_numbers(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    point = page.find_element("css selector", "#curve svg .mark-symbol:last-of-type path")
    ActionChains(page).move_to_element(point).perform()
    wait_until(page, "!document.getElementById('tip').hidden")
    assert "accuracy 80.00 %" in page.find_element("id", "tip").text


def test_the_page_fits_a_phone(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_background(page: Any, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['paper','card','ink','quiet','accent','code','warn'].map("
        "n => [n, s.getPropertyValue('--' + n).trim()]))"
    )
    for words in ("ink", "quiet", "accent"):
        for ground in ("paper", "card"):
            assert contrast(colours[words], colours[ground]) >= 4.5, (words, ground)
    for ground in ("code", "warn"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
