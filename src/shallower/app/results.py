"""What a run leaves beside the weights: result.json and curve.json, read, checked and compared in one place.

record = read_record(Path("small"))
record.verdict.small.params
print(comparison({"small": record, "half": read_record(Path("half"))}))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from shallower.app import quality as qualities
from shallower.certifying.certificate import Certificate
from shallower.core.codec import Bounds, decode, field_names, known_fields
from shallower.core.files import read_json
from shallower.core.text import amount, table
from shallower.errors import CheckpointError, ShallowerError
from shallower.planning.costs import Cost
from shallower.planning.curve import Point, Whole

RESULT = "result.json"
CURVE = "curve.json"
FAMILY = "family"
"""The folder of plans of the curve's points, where these are of squeezing."""

Seconds = Annotated[float, Bounds(0, 1e12)]

_LARGEST_EXAMPLE = 2**31
"""In the example inputs."""
_NOTED_ERROR = re.compile(r"held-out error (\d+(?:\.\d+)?) ?%")
"""How a note says a site's error."""
_RENAMED = {"memory": "size"}
"""Of costs, in files of schema 1 and 2."""


@dataclass(frozen=True)
class Measured:
    """A model: its score, and what it costs.

    Attributes:
        score: on the test set, where there is one; higher is better.
        params, macs: counted.
        size: bytes of parameters and buffers.
        latency: median seconds of one forward pass; None where it was not measured.
        kv: bytes of the KV cache for each token; None where the model returns none.
    """

    score: float
    params: Whole
    macs: Whole
    size: Whole
    latency: Seconds | None = None
    kv: Whole | None = None

    @property
    def cost(self) -> Cost:
        """All of it but the score."""
        return Cost(self.params, self.macs, self.size, self.latency, self.kv)


@dataclass(frozen=True)
class CurvePoint(Measured):
    """A point of curve.json: another model that the same run can give, or gave on its way.

    Attributes:
        score: that models are chosen by, on the validation set.
        label: what distinguishes it: "width 48", "3 removed".
        widths: channels of every site, by its name, where these tell the points apart.
        removed: activations that are gone, where these do.
        spread: interquartile range of the latency, seconds.
        test_score: on the test set, where there is one.
        norms: the file with what BatchNorm measured at these widths.
        chosen: this is the model that was saved.
    """

    label: Annotated[str, Bounds(0, 1000)] = ""
    widths: Mapping[str, Whole] = field(default_factory=dict)
    removed: Whole | None = None
    spread: Seconds | None = None
    test_score: float | None = None
    norms: str = ""
    chosen: bool = False

    @classmethod
    def of(cls, point: Point, **more: Any) -> CurvePoint:
        """A point of a `Curve`, with what else is known of it."""
        cost = point.cost
        costs = cost.params, cost.macs, cost.size, cost.latency, cost.kv
        return cls(point.score, *costs, point.label, point.widths, spread=point.spread, **more)

    @property
    def point(self) -> Point:
        """As a point of a `Curve`."""
        return Point(self.label, self.widths, self.score, self.cost, self.spread)

    @property
    def reported(self) -> float:
        """The score that people are told: on the test set, where there is one."""
        if self.test_score is None:
            return self.score
        return self.test_score


@dataclass(frozen=True)
class Speed:
    """How much faster the smaller model is.

    Attributes:
        predicted: how many times faster it would be if time were MACs alone.
        measured: how many times faster it is, the two timed alternately.
        spread: interquartile range of the ratio of the two times.
    """

    measured: Annotated[float, Bounds(1e-9, 1e9)]
    spread: Annotated[float, Bounds(0, 1e9)] = 0.0
    predicted: Annotated[float, Bounds(0, 1e18)] | None = None


@dataclass(frozen=True)
class Verdict:
    """A model and the smaller one that was made of it, side by side.

    Attributes:
        dense, small: the two.
        speedup: how many times faster the small one is, the two timed alternately; nan where that was not measured.
        spread: interquartile range of the ratio of the two times.
    """

    dense: Measured
    small: Measured
    speedup: float
    spread: float = 0.0

    @property
    def predicted(self) -> float:
        """How many times faster the small one would be if time were MACs alone."""
        return self.dense.macs / max(1, self.small.macs)

    @property
    def speed(self) -> Speed:
        """The speeds, as the file has them."""
        return Speed(self.speedup, self.spread, self.predicted)

    @property
    def is_noise(self) -> bool:
        """Whether the ratio of the two times varied by more than it differs from 1."""
        return abs(1 - 1 / self.speedup) <= self.spread

    def __str__(self) -> str:
        """The speed for people, marked where it may be chance; nothing where it was not measured."""
        if math.isnan(self.speedup):
            return ""
        if self.is_noise:
            return f"~{self.speedup:.2f}x"
        return f"{self.speedup:.2f}x"

    def rows(self, quality: str, name: str, note: str = "") -> list[tuple[str, ...]]:
        """Two rows of `verdict_table`: dense and small."""
        change = _percent(self.small.params, self.dense.params)
        speeds = f"{self.predicted:.2f}x", str(self)
        return [
            (name, *_cells(quality, self.dense, ""), "", ""),
            (f"  {note}".rstrip(), *_cells(quality, self.small, change), *speeds),
        ]


def verdict_table(quality: str, rows: Sequence[tuple[str, ...]]) -> str:
    """The rows of one or more verdicts under their header."""
    header = ("model", quality, "params", "", "MACs", "latency", "predicted", "measured")
    return _speed_table(header, rows, range(1, 8))


def _speed_table(header: Sequence[str], rows: Sequence[tuple[str, ...]], right: Collection[int]) -> str:
    """A table whose last column has speeds; below it, what the mark of some of them means."""
    text = table(header, rows, right=right)
    if any(row[-1].startswith("~") for row in rows):
        text += "\n~ not beyond the noise: the ratio of the times varied by more than it differs from 1"
    return text


@dataclass(frozen=True)
class SiteRow:
    """What became of one site.

    Attributes:
        name, kind, width: of the site.
        kept, linear, dropped: how many of its channels met that fate.
        becomes: its form after surgery.
        rank: of its linear map, where it has one of two factors.
        params, macs: before and after.
        error: relative error of its output on held-out data; None where the method does not measure it.
        note: why it was decided so.
    """

    name: str
    kind: str = ""
    width: Whole = 0
    kept: Whole = 0
    linear: Whole = 0
    dropped: Whole = 0
    becomes: str = ""
    rank: Whole = 0
    params: tuple[Whole, Whole] = (0, 0)
    macs: tuple[Whole, Whole] = (0, 0)
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Record:
    """What result.json says of a run.

    Attributes:
        options: all options of the run.
        quality: what the score is: "accuracy", "perplexity", ...
        dense, small: the model as it was, and the one that was saved.
        speed: of the second beside the first; None where it was not measured.
        sites: what became of each site.
        rows: how many rows there were of each split; None for a test split that is not there.
        example: shape of the inputs on which costs and latencies were taken, the rows first; () where unknown.
        classes: their names, where they have some.
        machine: where it ran, and with which versions.
        seconds: that it took.
        summary: in a paragraph, what was done, what it cost, and what more time would bring.
        alarms: why nobody should use the result unwarned.
        warnings: what the reader should know besides.
        details: what only some methods write.
        certificate: how often answers change, on test rows; None where that was not counted.
    """

    schema: Literal[3] = field(default=3, init=False)
    options: Mapping[str, Any]
    quality: str
    dense: Measured
    small: Measured
    speed: Speed | None = None
    sites: tuple[SiteRow, ...] = ()
    rows: Mapping[str, Whole | None] = field(default_factory=dict)
    example: tuple[Whole, ...] = ()
    classes: tuple[str, ...] | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: Seconds | None = None
    summary: str = ""
    alarms: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        """Refuse an example that nobody can have had.

        Raises:
            ValueError: it has too many numbers.
        """
        if math.prod(self.example) > _LARGEST_EXAMPLE:
            raise ValueError("its example inputs are out of range")

    @property
    def model(self) -> str:
        """The model, as it was asked for."""
        return self._asked("model")

    @property
    def data(self) -> str:
        """The data, as they were asked for."""
        return self._asked("data")

    @property
    def method(self) -> str:
        """The name of the method."""
        return self._asked("method")

    @property
    def target(self) -> str:
        """What was to be reached."""
        return self._asked("target")

    def _asked(self, name: str) -> str:
        return str(self.options.get(name) or "")

    @property
    def verdict(self) -> Verdict:
        """The two models side by side."""
        if self.speed is None:
            return Verdict(self.dense, self.small, math.nan)
        return Verdict(self.dense, self.small, self.speed.measured, self.speed.spread)


@dataclass(frozen=True)
class CurveFile:
    """What curve.json says.

    Attributes:
        name: of the score.
        points: other models that the same run can give.
    """

    schema: Literal[2] = field(default=2, init=False)
    name: str
    points: Annotated[tuple[CurvePoint, ...], Bounds(1, 10_000)]


def read_record(directory: Path, error: type[ShallowerError] = CheckpointError) -> Record:
    """What a run wrote about itself.

    Args:
        directory: of a result.
        error: the kind of error to raise.

    Raises:
        ShallowerError: there is no result.json in the directory, or it is damaged or of another version.
    """
    path = directory / RESULT
    if not path.is_file():
        raise error(f"{directory}: there is no {RESULT}; give a directory that `shallower compress` wrote")
    record: Record = decode(Record, _upgraded_record(read_json(path, error=error)), at=str(path), error=error)
    return record


def read_points(directory: Path, error: type[ShallowerError] = CheckpointError) -> tuple[CurvePoint, ...]:
    """The points of the curve of a run.

    Args:
        directory: of a result.
        error: the kind of error to raise.

    Raises:
        ShallowerError: there is no curve.json in the directory, or it is damaged.
    """
    path = directory / CURVE
    if not path.is_file():
        raise error(f"{directory}: there is no {CURVE}; shallower compress --sizes 5 writes one")
    curve: CurveFile = decode(CurveFile, _upgraded_curve(read_json(path, error=error)), at=str(path), error=error)
    return curve.points


def comparison(records: Mapping[str, Record]) -> str:
    """One table of several results by their names, each original model once, before what was made of it."""
    rows: list[tuple[str, ...]] = []
    certified = any(record.certificate for record in records.values())
    original = ""
    for name, record in sorted(records.items(), key=lambda pair: _original(pair[1])):
        dense, small, quality = record.dense, record.small, record.quality
        if original != _original(record):
            original = _original(record)
            rows.append((record.model or "the original", "", *_scored(quality, dense), "", "", ""))
        change, answers = _percent(small.params, dense.params), ""
        if record.certificate is not None:
            answers = record.certificate.short
        rows.append((f"  {name}", record.method, *_scored(quality, small), change, answers, str(record.verdict)))
    header = ["model", "method", "score", "", "params", "MACs", "size", "change", "other answers", "speed"]
    if not certified:
        header.pop(-2)
        rows = [(*row[:-2], row[-1]) for row in rows]
    text = _speed_table(header, rows, range(4, len(header)))
    machines = {json.dumps(record.machine, sort_keys=True) for record in records.values()}
    if len(machines) > 1:
        text += "\nmeasured on different machines or with other versions: compare the speeds with care"
    return text


def points_table(quality: str, points: Sequence[CurvePoint]) -> str:
    """The points of a curve for people."""
    rows = []
    for point in points:
        shown, params, _, macs, latency = _cells(quality, point, "")
        rows.append((point.label, shown, params, macs, f"{amount(point.size)}B", latency))
    return table(("model", quality, "params", "MACs", "size", "latency"), rows, right=range(1, 6))


def noted_error(note: str) -> float | None:
    """The held-out error that a plan's note says, as a fraction."""
    noted = _NOTED_ERROR.search(note)
    if noted is None:
        return None
    return float(noted[1]) / 100


def _scored(quality: str, side: Measured) -> tuple[str, ...]:
    costs = amount(side.params), amount(side.macs), f"{amount(side.size)}B"
    return (qualities.shown(quality, side.score), quality, *costs)


def _cells(quality: str, side: Measured, change: str) -> tuple[str, ...]:
    latency = ""
    if side.latency is not None:
        latency = qualities.seconds(side.latency)
    return qualities.shown(quality, side.score), amount(side.params), change, amount(side.macs), latency


def _percent(after: float, before: float) -> str:
    return f"{after / max(1, before) - 1:+.0%}"


def _original(record: Record) -> str:
    return json.dumps([record.model, record.data, record.quality, record.dense.score, record.dense.params])


# -------------------------------------------------------------------------------------- files of earlier versions


def _upgraded_record(data: Any) -> Any:
    """The content of result.json in today's form, where it is of schema 1 or 2, or of none."""
    if not isinstance(data, dict) or data.get("schema", 1) not in (1, 2):
        return data
    found = known_fields(Record, data, _RENAMED)
    others = data.keys() - field_names(Record)
    found |= {"schema": 3, "details": {key: data[key] for key in others}}
    for side in ("dense", "small"):
        if isinstance(found.get(side), dict):
            found[side] = known_fields(Measured, found[side], _RENAMED)
    sizes = str(found.get("example", "")).split(" x ")
    found["example"] = list(map(int, filter(str.isdecimal, sizes)))
    if isinstance(found.get("sites"), dict):
        found["sites"] = [_upgraded_site(name, site) for name, site in found["sites"].items()]
    return found


def _upgraded_site(name: str, site: Any) -> Any:
    if not isinstance(site, dict):
        return site
    return {"error": noted_error(str(site.get("note"))), **known_fields(SiteRow, site, _RENAMED), "name": name}


def _upgraded_curve(data: Any) -> Any:
    """The content of curve.json in today's form, where it is of schema 1, or a list."""
    if isinstance(data, dict) and data.get("schema", 1) == 1:
        data = data.get("points")
    if not isinstance(data, list):
        return data
    points = []
    for point in data:
        if isinstance(point, dict):
            point = known_fields(CurvePoint, point, _RENAMED)
        points.append(point)
    return {"schema": 2, "name": "", "points": points}
