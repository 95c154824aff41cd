"""The plots of a report as Vega-Lite specifications, and the Vega library that draws them.

Colours are the page's CSS variables, so that light and dark need no second drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from shallower.app import quality as qualities
from shallower.app.report.data import Report
from shallower.app.results import SiteRow

_AXIS = {
    "domain": False,
    "ticks": False,
    "gridColor": "var(--grid)",
    "labelColor": "var(--quiet)",
    "titleColor": "var(--quiet)",
    "labelFontSize": 12,
    "titleFontSize": 12,
    "titleFontWeight": "normal",
    "labelPadding": 6,
}
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": _AXIS,
    "legend": {"labelColor": "var(--ink)", "labelFontSize": 12, "title": None},
    "text": {"fill": "var(--ink)", "fontSize": 12},
}
_FRAME = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "config": _CONFIG}
_COST = (
    "cost == 'latency' ? format(datum.value * 1e3, '.3~g') + ' ms' : "
    "cost == 'size' ? format(datum.value / 1e6, '.3~g') + ' MB' : format(datum.value, '.3~s')"
)


def library() -> str | None:
    """Vega as one script, or None where the package that carries it is not installed."""
    try:
        return _library()
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _library() -> str:
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")


def curve(report: Report, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Quality against cost. The parameters `cost`, `budget` and `shown` (index of a point) are set by the page."""
    better, unit = "higher is better", ""
    if qualities.lower_is_better(report.quality):
        better = "lower is better"
    if report.quality in qualities.PERCENT:
        unit = " %"
    y = {
        "field": "quality",
        "type": "quantitative",
        "scale": {"zero": False, "nice": True, "padding": 12},
        "axis": {
            "title": f"{report.quality}{unit}, {better}",
            "titleAnchor": "start",
            "titleAngle": 0,
            "titleAlign": "left",
            "titleX": 0,
            "titleY": -14,
            "tickCount": 5,
        },
    }
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"zero": False, "nice": True, "padding": 12},
        "axis": {"title": None, "labelExpr": _COST, "tickCount": 4, "grid": False, "labelOverlap": True},
    }
    shown = {"test": "datum.index == shown", "value": 220}
    return {
        **_FRAME,
        "width": "container",
        "height": 280,
        "padding": {"top": 24, "left": 4, "right": 8, "bottom": 4},
        "description": f"{report.quality} against cost; the table below has the same numbers",
        "params": [{"name": "cost", "value": "params"}, {"name": "budget", "value": 0}, {"name": "shown", "value": -1}],
        "data": {"name": "points", "values": list(points)},
        "transform": [{"calculate": "datum[cost]", "as": "x"}, {"filter": "isValid(datum.x)"}],
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "data": {"values": [{}]},
                "transform": [{"calculate": "budget", "as": "limit"}, {"filter": "datum.limit > 0"}],
                "mark": {"type": "rule", "color": "var(--accent)", "strokeWidth": 1.5, "strokeDash": [5, 4]},
                "encoding": {
                    "x": {"field": "limit", "type": "quantitative"},
                    "y": {"value": 0},
                    "y2": {"value": "height"},
                },
            },
            {
                "mark": {"type": "line", "color": "var(--accent)", "strokeWidth": 1.5, "opacity": 0.6},
                "transform": [{"filter": "datum.front[cost]"}],
                "encoding": {"order": {"field": "x"}},
            },
            {
                "mark": {"type": "point", "filled": True, "opacity": 1, "strokeWidth": 2},
                "encoding": {
                    "shape": {
                        "condition": {"test": "datum.kind == 'before'", "value": "diamond"},
                        "value": "circle",
                    },
                    "fill": {
                        "condition": {"test": "datum.kind == 'before'", "value": "var(--quiet)"},
                        "value": "var(--accent)",
                    },
                    "stroke": {"condition": {"test": "datum.index == shown", "value": "var(--ink)"}, "value": "none"},
                    "size": {
                        "condition": shown,
                        "value": 80,
                    },
                    "description": {"field": "told", "type": "nominal"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 900, "opacity": 0},
                "encoding": {"tooltip": {"field": "told", "type": "nominal"}},
            },
        ],
    }


def sites(rows: Sequence[SiteRow]) -> dict[str, Any]:
    """For every site the parts of its channels that met each fate, and its error."""
    values, marks = [], []
    for i, (row, short) in enumerate(zip(rows, short_names([row.name for row in rows]), strict=True)):
        site = f"{i}|{short}"
        note = becomes(row)
        for order, (fate, count) in enumerate(fates(row)):
            if count:
                share = count / max(1, row.kept + row.linear + row.dropped)
                told = f"{row.name}: {count:,} of {row.width:,} channels {fate}; {note}"
                values.append({"site": site, "fate": fate, "order": order, "share": share, "told": told})
        if row.error is not None:
            note += f", error {row.error:.2%}"
        marks.append({"site": site, "note": note})
    y = {
        "field": "site",
        "type": "nominal",
        "sort": None,
        "scale": {"paddingInner": 0.35},
        "axis": {
            "title": None,
            "labelExpr": "split(datum.value, '|')[1]",
            "labelLimit": 150,
            "labelColor": "var(--ink)",
        },
    }
    return {
        **_FRAME,
        "width": "container",
        "height": 34 * len(rows) + 50,
        "padding": {"top": 4, "left": 4, "right": 8, "bottom": 4},
        "description": "for every site the share of its channels kept, made linear and dropped",
        "encoding": {"y": y},
        "layer": [
            {
                "data": {"values": values},
                "mark": {"type": "bar", "height": {"band": 0.5}, "yOffset": 7},
                "encoding": {
                    "x": {
                        "field": "share",
                        "type": "quantitative",
                        "stack": "zero",
                        "scale": {"domain": [0, 1]},
                        "axis": {"title": None, "format": ".0%", "tickCount": 4, "grid": False},
                    },
                    "order": {"field": "order"},
                    "color": {
                        "field": "fate",
                        "type": "nominal",
                        "scale": {
                            "domain": ["kept", "made linear", "dropped"],
                            "range": ["var(--kept)", "var(--linear)", "var(--dropped)"],
                        },
                        "legend": {"orient": "top", "symbolType": "square"},
                    },
                    "tooltip": {"field": "told", "type": "nominal"},
                    "description": {"field": "told", "type": "nominal"},
                },
            },
            {
                "data": {"values": marks},
                "mark": {"type": "text", "align": "left", "baseline": "bottom", "dy": -2, "fontSize": 11},
                "encoding": {"x": {"value": 0}, "text": {"field": "note"}, "color": {"value": "var(--quiet)"}},
            },
        ],
    }


def fates(row: SiteRow) -> tuple[tuple[str, int], ...]:
    """What became of its channels; an activation place has none, and went as a whole."""
    if not row.width:
        return (("kept", 0), ("made linear", 1), ("dropped", 0))
    return (("kept", row.kept), ("made linear", row.linear), ("dropped", row.dropped))


def becomes(row: SiteRow) -> str:
    """The form of a site in words."""
    noun = "channels"
    if row.kind == "heads":
        noun = "heads"
    words = {
        "merged": "one linear map",
        "pair": "two linear maps, nothing between",
        "apart": "the layers without their activation",
        "narrower": f"{row.width:,} → {row.kept:,} {noun}",
        "partial": f"{row.kept:,} {noun} and a linear path",
        "removed": "the activation goes",
    }
    return words.get(row.becomes, row.becomes)


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the dotted beginning that all share."""
    if len(names) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    cut = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [".".join(part[cut:]) or name for part, name in zip(parts, names, strict=True)]
