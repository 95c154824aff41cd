"""What a report says, as plain data, read from the files of a result.

Nothing here needs PyTorch: result.json and curve.json hold all of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallower.errors import ReportError

RESULT = "result.json"
CURVE = "curve.json"

_ERROR = re.compile(r"held-out error ([\d.]+) ?%")

METHODS: Mapping[str, str] = {
    "layer-collapse": "LayerCollapse",
    "squeeze": "calibrated squeezing",
    "tlc": "Till the Layers Collapse",
    "till-layers-collapse": "Till the Layers Collapse",
    "structural-dropout": "Structural Dropout",
}
"""What the methods are called in a sentence."""


@dataclass(frozen=True)
class Point:
    """A model: its quality and what it costs.

    Attributes:
        label: what distinguishes it: "width 48", "3 removed".
        score: higher is better, as tasks.py gives it.
        params, macs: counted.
        memory: bytes of parameters and buffers.
        latency: median seconds of one forward pass; None where it was not measured.
        chosen: this is the model that was saved.
        ranked: the score that models are chosen by, where it was taken on other rows than `score`; None: `score`.
    """

    label: str
    score: float
    params: int
    macs: int
    memory: int
    latency: float | None = None
    chosen: bool = False
    ranked: float | None = None

    @property
    def rank(self) -> float:
        """What models are chosen by."""
        return self.score if self.ranked is None else self.ranked


@dataclass(frozen=True)
class SiteRow:
    """What became of one site.

    Attributes:
        name, kind, width: of the site.
        kept, linear, dropped: how many of its channels met that fate.
        becomes: its form after surgery.
        params, macs: before and after.
        error: relative error of its output on held-out data; None where the method does not measure it.
        note: why it was decided so.
    """

    name: str
    kind: str
    width: int
    kept: int
    linear: int
    dropped: int
    becomes: str
    params: tuple[int, int]
    macs: tuple[int, int]
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
        directory: as commands and code on the page name it.
        model, data, method, target: what was asked for.
        quality: what the score is: "accuracy", "perplexity", ...
        before, after: the model as it was, and the one that was saved.
        speedup: how many times faster the second was, timed in turn; None where not timed.
        spread: interquartile range of the ratio of their times.
        curve: other models that the same training or calibration gives, with those two or without.
        sites: what became of each site.
        measured: how the numbers came about: (what, how).
        source: how the architecture is built again; "" where only the user can.
        stock: the class in Transformers that loads the result as it is, or "".
        command: what makes a smaller or larger model of the curve, with {directory}, {target} and {output}; "" if none.
        warnings: what the reader should know before anything else.
        version: of Shallower.
    """

    directory: str
    model: str
    data: str
    method: str
    target: str
    quality: str
    before: Point
    after: Point
    speedup: float | None = None
    spread: float | None = None
    curve: tuple[Point, ...] = ()
    sites: tuple[SiteRow, ...] = ()
    measured: tuple[tuple[str, str], ...] = ()
    source: str = ""
    stock: str = ""
    command: str = ""
    warnings: tuple[str, ...] = ()
    version: str = ""

    @property
    def lower_is_better(self) -> bool:
        """Whether people read the quality so; scores are always better when higher."""
        return self.quality == "perplexity"

    def shown(self, score: float) -> float:
        """The score on the scale that people read: percent, or a perplexity."""
        if self.quality == "perplexity":
            return math.exp(min(-score, 700.0))
        return score * 100 if self.percent else score

    @property
    def percent(self) -> bool:
        """Whether the quality is a part of a whole."""
        return self.quality in ("accuracy", "agreement")

    def told(self, score: float) -> str:
        """The score as people read it."""
        if self.percent:
            return f"{score * 100:.2f} %"
        return f"{self.shown(score):.4g}" if self.quality == "perplexity" else f"{score:.4f}"

    def difference(self) -> str:
        """How the quality changed."""
        change = self.shown(self.after.score) - self.shown(self.before.score)
        if self.percent:
            return f"{change:+.2f} points"
        return f"{change:+.3g}" if self.quality == "perplexity" else f"{change:+.4f}"


def read_report(directory: str | Path, *, at: str | Path | None = None) -> Report:
    """The report on a saved directory, from its result.json, config.json and, where there is one, curve.json.

    Args:
        directory: what a command here wrote.
        at: what the page shall call the directory, if it is to be moved.

    Raises:
        ReportError: a file is missing, damaged or not what it should be; the error names it and the key.
    """
    directory = Path(directory).expanduser()
    result = _object(directory / RESULT)
    try:
        return _report(directory, str(at or directory), result, _curve(directory / CURVE))
    except KeyError as error:
        raise ReportError(
            f"{directory / RESULT}: {error.args[0]!r} is missing; was it written by this Shallower?"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{directory / RESULT}: it does not describe a result: {error}") from error


def _report(directory: Path, name: str, result: Mapping[str, Any], curve: Mapping[str, Any]) -> Report:
    options = result["options"]
    speed = result.get("speed") or {}
    sites = result.get("sites") or {}
    rows = tuple(_site(site, data) for site, data in sites.items())
    command = "shallower pick {directory} --target {target} --output {output}" if curve else ""
    return Report(
        directory=name,
        model=str(options["model"]),
        data=str(options.get("data", "")),
        method=str(options.get("method", "")),
        target=str(options.get("target", "")),
        quality=str(result["quality"]),
        before=_point(result["dense"], "as it was"),
        after=_point(result["small"], "saved", chosen=True),
        speedup=_number(speed.get("measured")),
        spread=_number(speed.get("spread")),
        curve=tuple(_point(point) for point in curve.get("points", ())),
        sites=rows,
        measured=_measured(result, options),
        source=source_of(directory, str(options["model"])),
        stock=stock_class(directory, rows),
        command=str(curve.get("command", command)),
        warnings=tuple(map(str, result.get("warnings") or ())),
        version=str((result.get("machine") or {}).get("shallower", "")),
    )


def _point(data: Mapping[str, Any], label: str = "", *, chosen: bool = False) -> Point:
    tested = _number(data.get("test_score"))
    return Point(
        str(data.get("label") or label),
        float(data["score"]) if tested is None else tested,
        int(data["params"]),
        int(data["macs"]),
        int(data["memory"]),
        _number(data.get("latency")),
        bool(data.get("chosen", chosen)),
        None if tested is None else float(data["score"]),
    )


def _site(name: str, data: Mapping[str, Any]) -> SiteRow:
    note = str(data.get("note", ""))
    told = _ERROR.search(note)
    error = float(told[1]) / 100 if told and data.get("error") is None else _number(data.get("error"))
    counts = {key: int(data.get(key, 0)) for key in ("width", "kept", "linear", "dropped")}
    (p0, p1), (m0, m1) = data.get("params", (0, 0)), data.get("macs", (0, 0))
    return SiteRow(
        name,
        str(data.get("kind", "")),
        **counts,
        becomes=str(data.get("becomes", "")),
        params=(int(p0), int(p1)),
        macs=(int(m0), int(m1)),
        error=error,
        note=note,
    )


def _measured(result: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    machine, rows, speed = (result.get(key) or {} for key in ("machine", "rows", "speed"))
    told = []
    if rows:
        tested, chosen = rows.get("test"), rows.get("validation", 0)
        where = (
            f"On {tested:,} test rows, on which nothing was chosen; choices were made on {chosen:,} others."
            if tested
            else f"On {chosen:,} rows, and choices were made on the same: there were no others, so it may flatter."
        )
        trained = f"{rows.get('train', 0):,} rows were trained or calibrated on."
        told.append((f"Quality ({result['quality']})", f"{where} {trained}"))
    if speed.get("measured") is not None:
        on = f" on inputs of {result['example']}" if result.get("example") else ""
        threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if machine.get("threads") else ""
        told.append(
            (
                "Latency",
                f"Median forward pass{on}, both models taking turns, so that what else the machine did fell on both; "
                f"{machine.get('device') or machine.get('processor', '')}{threads}. "
                f"The ratio of the times varied by {float(speed.get('spread') or 0):.1%} between its quartiles.",
            )
        )
    told.append(
        (
            "MACs and parameters",
            "Counted: multiply-accumulates of one forward pass on those inputs; tied parameters once.",
        )
    )
    told.append(("Memory", "Bytes of parameters and buffers."))
    if result.get("tried"):
        told.append(("Settings tried", str(result["tried"])))
    if options.get("seed") is not None:
        told.append(("Seed", str(options["seed"])))
    if result.get("seconds"):
        told.append(("Time taken", _duration(float(result["seconds"]))))
    versions = [f"{key} {machine[key]}" for key in ("shallower", "torch", "python") if machine.get(key)]
    if versions:
        told.append(("Versions", ", ".join(versions)))
    return tuple(told)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def source_of(directory: Path, model: str) -> str:
    """How the architecture of a saved directory is built again, as far as it says; "" where only the user can.

    Raises:
        ReportError: a file cannot be read.
    """
    for folder in (directory, *([Path(model).expanduser()] if model else [])):
        description = folder / "shallower.json"
        if description.is_file():
            return str(_object(description).get("source", ""))
    if model.partition(":")[0] in ("timm", "torchvision"):
        return model
    config = directory / "config.json"
    if config.is_file():
        return f"transformers:{next(iter(_object(config).get('architectures') or ['']))}"
    return ""


def stock_class(directory: Path, sites: Sequence[SiteRow]) -> str:
    """The Transformers class whose `from_pretrained` loads the directory, where all sites are equally narrower.

    Raises:
        ReportError: a file cannot be read.
    """
    config = directory / "config.json"
    if not config.is_file() or not sites or any(site.becomes != "narrower" or site.linear for site in sites):
        return ""
    data = _object(config)
    kept = {site.kept for site in sites}
    width = next(iter(kept))
    names = data.get("architectures") or [""]
    return str(names[0]) if len(kept) == 1 and width in data.values() else ""


def _curve(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    curve = _json(path)
    if isinstance(curve, list):
        curve = {"points": curve}
    if not isinstance(curve, dict) or not isinstance(curve.get("points"), list):
        raise ReportError(f"{path}: it holds no list of points")
    return curve


def _object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ReportError(f"{path.parent}: there is no {path.name}; give a directory that `shallower compress` wrote")
    data = _json(path)
    if not isinstance(data, dict):
        raise ReportError(f"{path}: it holds no object")
    return data


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)
