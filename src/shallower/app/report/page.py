"""One self-contained HTML file from a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from shallower.app.report import charts
from shallower.app.report.data import METHODS, Point, Report, read_report
from shallower.core.files import write_text
from shallower.core.text import amount
from shallower.errors import ReportError

NAME = "report.html"


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
    page = directory / NAME
    write_text(page, render(read_report(directory, at=at) if report is None else report), error=ReportError)
    return page


def render(report: Report) -> str:
    """The page. Without the package that carries Vega it has tables in the place of plots, and says so."""
    points = _points(report)
    rows = report.sites
    library = charts.library() if points or rows else None
    data: dict[str, Any] = {"directory": report.directory, "command": report.command}
    if points:
        data["points"] = points
    if library is not None:
        data["curve"] = charts.curve(report, points) if points else None
        data["sites"] = charts.sites(rows) if rows else None
    units = [(unit, name) for unit, name in _UNITS.items() if not points or all(p[unit] is not None for p in points)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html")).render(
        report=report,
        title=f"{_short(report.model)}, squeezed",
        summary=summary(report),
        method=METHODS.get(report.method, report.method),
        cards=_cards(report),
        units=units,
        points=[
            {
                "index": p["index"],
                "label": p["label"],
                "score": report.told(p["score"]),
                "costs": {unit: _cost(unit, p[unit]) for unit, _ in units},
            }
            for p in points
        ],
        where=_where(report),
        rows=[
            {
                "site": site,
                "becomes": charts.becomes(site),
                "costs": [amount(cost) for cost in (*site.params, *site.macs)],
                "error": "" if site.error is None else f"{site.error:.2%}",
            }
            for site in rows
        ],
        errors=any(site.error is not None for site in rows),
        notes=any(site.note for site in rows),
        curve_text=f"{report.quality} of {len(points)} models against their cost; all numbers are in the table below",
        sites_text=f"the fates of the channels of {len(rows)} sites; all numbers are in the table below",
        usage=usage(report),
        library=None if library is None else Markup(library),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )


def summary(report: Report) -> str:
    """The result in a sentence."""
    before, after = report.before, report.after
    parts = [
        f"{after.params / max(1, before.params):.0%} of the parameters",
        f"{after.macs / max(1, before.macs):.0%} of the MACs",
    ]
    if report.speedup is not None:
        parts.append(f"{report.speedup:.2f} times as fast" if report.speedup >= 1.005 else "no faster")
    return (
        f"{', '.join(parts)}; {report.quality} {report.told(after.score)}, was {report.told(before.score)} "
        f"({report.difference()})."
    )


def usage(report: Report) -> list[Snippet]:
    """How to use the result: code to copy."""
    where = report.directory
    again = "" if report.source.partition(":")[0] in ("timm", "torchvision", "transformers") else ", model=make_model()"
    hint = "" if not again else "# make_model: a fresh instance of the original,\n# whatever its weights\n"
    load = f"import shallower as sh\n\n{hint}model = sh.load({where!r}{again})"
    snippets = [Snippet("Load it in Python", "python", load)]
    if report.stock:
        code = f"from transformers import {report.stock}\n\nmodel = {report.stock}.from_pretrained({where!r})"
        snippets.append(Snippet("Or without Shallower: it is a stock model", "python", code))
    onnx = f"shallower export {_quoted(where)} model.onnx\nshallower bench {_quoted(where)}"
    if not again:
        snippets.append(Snippet("Run it without PyTorch, or time it on this machine", "sh", onnx))
    return snippets


_UNITS = {"params": "parameters", "macs": "MACs", "memory": "memory", "latency": "latency"}


def _cost(unit: str, value: float | None) -> str:
    if value is None:
        return ""
    if unit == "latency":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{amount(value)}B" if unit == "memory" else amount(value)


def _cards(report: Report) -> list[dict[str, Any]]:
    before, after = report.before, report.after
    cards: list[dict[str, Any]] = [
        {
            "name": report.quality,
            "after": report.told(after.score),
            "before": report.told(before.score),
            "change": f"({report.difference()})",
            "share": None,
        }
    ]
    for unit, name in _UNITS.items():
        old, new = getattr(before, unit), getattr(after, unit)
        if old is None or new is None:
            continue
        share = new / old if old else 1.0
        change = f"({share - 1:+.0%})"
        if unit == "latency" and report.speedup is not None:
            share, change = 1 / report.speedup, f"({report.speedup:.2f}x as fast)"
        cards.append(
            {
                "name": name,
                "after": _cost(unit, new),
                "before": _cost(unit, old),
                "change": change,
                "share": round(100 * min(1.0, share), 1),
            }
        )
    return cards


def _points(report: Report) -> list[dict[str, Any]]:
    """The models of the curve, cheapest first, with the two of the report; nothing where there is no curve."""
    if not report.curve:
        return []

    def same(a: Point, b: Point) -> bool:
        return (a.params, a.macs) == (b.params, b.macs)

    twins = {id(q): p for q in (report.before, report.after) for p in report.curve if same(p, q)}
    others = [p for p in report.curve if not (same(p, report.before) or same(p, report.after) or p.chosen)]
    kinds = [(report.before, "before"), *[(p, "") for p in others], (report.after, "chosen")]
    if same(report.before, report.after):  # trained at all widths, and saved at the full one
        kinds = kinds[1:]
    kinds.sort(key=lambda pair: (pair[0].params, pair[0].macs))
    points = []
    for index, (point, kind) in enumerate(kinds):
        twin = twins.get(id(point), point)
        label = twin.label or point.label
        name = {"before": "the model as it was", "chosen": f"{label} (saved)" if label != "saved" else "saved"}.get(
            kind, label
        )
        costs = [f"{_cost(unit, getattr(point, unit))} {noun}".strip() for unit, noun in _NOUNS if getattr(point, unit)]
        words = f"{report.quality} {report.told(point.score)}, {', '.join(costs)}"
        points.append(
            {
                "index": index,
                "kind": kind,
                "label": name,
                "score": point.score,
                "rank": twin.rank,
                "quality": report.shown(point.score),
                **{unit: getattr(point, unit) for unit in _UNITS},
                "words": words,
                "told": f"{name}: {words}",
            }
        )
    for point_ in points:
        point_["front"] = {unit: _on_front(point_, points, unit) for unit in _UNITS}
    return points


_NOUNS = (("params", "parameters"), ("macs", "MACs"), ("memory", ""), ("latency", ""))


def _on_front(point: dict[str, Any], points: Sequence[dict[str, Any]], unit: str) -> bool:
    """Whether no other model is better and as cheap."""
    if point[unit] is None:
        return False
    cheap = [p for p in points if p[unit] is not None and p[unit] <= point[unit] and p is not point]
    return all(p["score"] < point["score"] or (p["score"], p[unit]) == (point["score"], point[unit]) for p in cheap)


def _where(report: Report) -> str:
    rows = report.sites
    merged = sum(1 for row in rows if row.becomes in ("merged", "pair", "apart", "removed"))
    narrow = sum(1 for row in rows if row.becomes in ("narrower", "partial"))
    parts = []
    if merged:
        parts.append(f"{merged} {'lost its' if merged == 1 else 'lost their'} activation")
    if narrow:
        parts.append(f"{narrow} became narrower")
    saved = max((row.params[0] - row.params[1], row.name) for row in rows) if rows else (0, "")
    most = f" Most was saved at {saved[1]}: {amount(saved[0])} parameters." if saved[0] > 0 and len(rows) > 1 else ""
    places = "site" if len(rows) == 1 else "sites"
    return f"{len(rows)} {places} in the network: {' and '.join(parts) or 'none changed'}.{most}"


def _short(model: str) -> str:
    """A model's name without folders and options."""
    name = model.partition("?")[0].rstrip("/")
    return name.rsplit("/", 1)[-1] if "/" in name else name


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _file(name: str) -> str:
    return files("shallower.app.report").joinpath(name).read_text(encoding="utf-8")
