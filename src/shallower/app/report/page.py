"""One self-contained HTML file from a report."""

from __future__ import annotations

import json
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shallower.app import quality as qualities
from shallower.app.deciding.telling import FASTER
from shallower.app.report import charts
from shallower.app.report.data import Report, read_report
from shallower.app.results import Measured, SiteRow
from shallower.core.failures import failing
from shallower.core.files import write_text
from shallower.core.text import amount
from shallower.errors import ReportError

PAGE = "report.html"
_TEMPLATE = "page.html"

_UNITS = {"params": "parameters", "macs": "MACs", "size": "size", "latency": "latency"}
_NOUNS = {"params": "parameters", "macs": "MACs", "size": "", "latency": ""}

_LEAST_DIFFERENCE = 1e-12
"""In the place of a cost of nothing, to divide by."""


@dataclass(frozen=True)
class Snippet:
    """Something to copy: `language` is "python" or "sh"."""

    title: str
    language: str
    code: str


def write_report(directory: str | Path, report: Report | None = None, *, at: str | Path | None = None) -> Path:
    """Write report.html into a saved directory, whole or not at all.

        write_report("small/")

    Args:
        directory: what a command here wrote.
        report: what to say; by default what `read_report` finds in the directory.
        at: what the page shall call the directory, if it is to be moved.

    Returns:
        The path of the page.

    Raises:
        ReportError: a file is missing or damaged, or the page cannot be written.
    """
    directory = Path(directory).expanduser()
    if report is None:
        report = read_report(directory, at=at)
    page = directory / PAGE
    write_text(page, render(report), error=ReportError)
    return page


def render(report: Report) -> str:
    """The page. Without the package that carries Vega it has tables in the place of plots, and says so."""
    points = _points(report)
    rows = report.sites
    library = None
    if points or rows:
        library = charts.library()
    data: dict[str, Any] = {"directory": report.directory, "command": report.command}
    if points:
        data["points"] = points
    if library is not None:
        data |= _plots(report, points)
    units = dict(_UNITS)
    if any(point["latency"] is None for point in points):
        del units["latency"]
    return _rendered(
        report=report,
        record=report.record,
        title=title(report),
        headline=headline(report),
        cards=_cards(report),
        units=list(units.items()),
        points=points,
        where=_where(report),
        rows=list(map(_site_row, rows)),
        errors=any(site.error is not None for site in rows),
        notes=any(site.note for site in rows),
        curve_text=f"{report.quality} of {len(points)} models against their cost; all numbers are in the table below",
        sites_text=f"the fates of the channels of {len(rows)} sites; all numbers are in the table below",
        usage=usage(report),
        library=library and Markup(library),
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )


def _rendered(**values: Any) -> str:
    """The template with these values.

    Raises:
        ReportError: it failed; the error says where.
    """
    environment = Environment(
        loader=PackageLoader("shallower.app.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        return environment.get_template(_TEMPLATE).render(values)
    except Exception as error:
        place = _TEMPLATE
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename.endswith(_TEMPLATE):
                place = f"{_TEMPLATE}, line {frame.lineno}"
        with failing(ReportError, f"the report's template failed ({place})"):
            raise


def _plots(report: Report, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The specifications of those plots for which there is data."""
    plots: dict[str, Any] = {"curve": None, "sites": None}
    if points:
        plots["curve"] = charts.curve(report, points)
    if report.sites:
        plots["sites"] = charts.sites(report.sites)
    return plots


def _site_row(site: SiteRow) -> dict[str, Any]:
    error = ""
    if site.error is not None:
        error = f"{site.error:.2%}"
    costs = list(map(amount, (*site.params, *site.macs)))
    return {"site": site, "becomes": charts.becomes(site), "costs": costs, "error": error}


def title(report: Report) -> str:
    """What the result is called: "resnet18, by LayerCollapse"."""
    name = _short_name(report.record.model)
    if not report.method:
        return f"{name}, smaller"
    return f"{name}, by {report.method}"


def headline(report: Report) -> str:
    """The result in a sentence."""
    before, after = report.before, report.after
    parts = [
        f"{after.params / max(1, before.params):.0%} of the parameters",
        f"{after.macs / max(1, before.macs):.0%} of the MACs",
    ]
    if report.speedup is not None:
        parts.append(_speed(report, report.speedup))
    return (
        f"{', '.join(parts)}; {report.quality} {report.shown(after.score)}, was {report.shown(before.score)} "
        f"({report.difference()})."
    )


def _speed(report: Report, speedup: float) -> str:
    if report.record.verdict.is_noise:
        return "not faster beyond the noise"
    if speedup < FASTER:
        return "no faster"
    return f"{speedup:.2f} times as fast"


def usage(report: Report) -> list[Snippet]:
    """How to use the result: code to copy."""
    where = report.directory
    again, hint = "", ""
    if report.again:
        again = ", model=make_model()"
        hint = "# make_model: a fresh instance of the original,\n# whatever its weights\n"
    load = f"import shallower as sh\n\n{hint}model = sh.load({where!r}{again})"
    snippets = [Snippet("Load it in Python", "python", load)]
    if report.stock:
        code = f"from transformers import {report.stock}\n\nmodel = {report.stock}.from_pretrained({where!r})"
        snippets.append(Snippet("Or without Shallower: it is a stock model", "python", code))
    if not report.again:
        onnx = f"shallower export {shlex.quote(where)} model.onnx\nshallower bench {shlex.quote(where)}"
        snippets.append(Snippet("Run it without PyTorch, or time it on this machine", "sh", onnx))
    return snippets


def _cost_text(unit: str, value: float | None) -> str:
    if value is None:
        return ""
    if unit == "latency":
        return qualities.seconds(value)
    if unit == "size":
        return f"{amount(value)}B"
    return amount(value)


def _cards(report: Report) -> list[dict[str, Any]]:
    """The numbers on top: the quality, and each cost that was measured."""
    before, after = report.before, report.after
    cards: list[dict[str, Any]] = [
        {
            "name": report.quality,
            "after": report.shown(after.score),
            "before": report.shown(before.score),
            "change": f"({report.difference()})",
            "share": None,
        }
    ]
    for unit, name in _UNITS.items():
        old, new = getattr(before, unit), getattr(after, unit)
        if old is None or new is None:
            continue
        share = new / max(old, _LEAST_DIFFERENCE)
        change = f"({share - 1:+.0%})"
        if unit == "latency" and report.speedup is not None:
            share, change = 1 / report.speedup, f"({report.speedup:.2f}x as fast)"
            if report.record.verdict.is_noise:
                change = f"({report.speedup:.2f}x as fast, within the noise)"
        width = round(100 * min(1.0, share), 1)
        costs = {"after": _cost_text(unit, new), "before": _cost_text(unit, old)}
        cards.append({"name": name, "change": change, "share": width, **costs})
    return cards


def _points(report: Report) -> list[dict[str, Any]]:
    """The models of the curve, cheapest first, with the two of the report; nothing where there is no curve."""
    if not report.curve:
        return []
    before, after = report.before, report.after
    points = [_side_point(report, after, "chosen")]
    if not _same_model(before, after):  # else trained at all widths, and saved at the full one
        points.append(_side_point(report, before, "before"))
    for known in report.curve:
        if not (_same_model(known, before) or _same_model(known, after) or known.chosen):
            points.append(_plot_point(report, known, "", known.label, known.reported, known.score))
    points.sort(key=lambda point: (point["params"], point["macs"]))
    for index, point in enumerate(points):
        point["index"] = index
        point["front"] = {unit: _on_front(point, points, unit) for unit in _UNITS}
    return points


def _same_model(a: Measured, b: Measured) -> bool:
    return (a.params, a.macs) == (b.params, b.macs)


def _side_point(report: Report, side: Measured, kind: str) -> dict[str, Any]:
    """One of the two of the report: the curve has its name and the score that it was chosen by."""
    label, rank = "saved", side.score
    for twin in report.curve:
        if _same_model(twin, side):
            rank = twin.score
            if twin.label:
                label = f"{twin.label} (saved)"
            break
    if kind == "before":
        label = "the model as it was"
    return _plot_point(report, side, kind, label, side.score, rank)


def _plot_point(report: Report, point: Measured, kind: str, label: str, score: float, rank: float) -> dict[str, Any]:
    """A point of the plot: its numbers, and what is said where it is shown."""
    costs: dict[str, float | None] = {}
    texts = {}
    words = [f"{report.quality} {report.shown(score)}"]
    for unit, noun in _NOUNS.items():
        costs[unit] = getattr(point, unit)
        texts[unit] = _cost_text(unit, costs[unit])
        if texts[unit]:
            words.append(f"{texts[unit]} {noun}".rstrip())
    told = ", ".join(words)
    return {
        "kind": kind,
        "label": label,
        "score": score,
        "shown": report.shown(score),
        "rank": rank,
        "quality": qualities.number(report.quality, score),
        **costs,
        "costs": texts,
        "words": told,
        "told": f"{label}: {told}",
    }


def _on_front(point: dict[str, Any], points: Sequence[dict[str, Any]], unit: str) -> bool:
    """Whether no other model is better and as cheap."""
    if point[unit] is None:
        return False
    for other in points:
        if other is point or other[unit] is None or other[unit] > point[unit]:
            continue
        equal = (other["score"], other[unit]) == (point["score"], point[unit])
        if other["score"] >= point["score"] and not equal:
            return False
    return True


def _where(report: Report) -> str:
    rows = report.sites
    forms = [row.becomes for row in rows]
    merged = sum(map(forms.count, ("merged", "pair", "apart", "removed")))
    narrow = sum(map(forms.count, ("narrower", "partial")))
    parts = []
    if merged == 1:
        parts.append("1 lost its activation")
    elif merged:
        parts.append(f"{merged} lost their activation")
    if narrow:
        parts.append(f"{narrow} became narrower")
    text = f"{amount_of(len(rows), 'site')} in the network: {' and '.join(parts) or 'none changed'}."
    if len(rows) > 1:
        saved, name = max((row.params[0] - row.params[1], row.name) for row in rows)
        if saved > 0:
            text += f" Most was saved at {name}: {amount(saved)} parameters."
    return text


def amount_of(count: int, noun: str) -> str:
    """A count with its noun: "1 site", "3 sites"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


def _short_name(model: str) -> str:
    """A model's name without folders and options."""
    return model.partition("?")[0].rstrip("/").rpartition("/")[-1]


def _asset(name: str) -> str:
    return files("shallower.app.report").joinpath(name).read_text(encoding="utf-8")
