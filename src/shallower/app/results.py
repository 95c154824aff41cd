"""What a run leaves beside the weights: result.json and curve.json, read, checked and compared in one place.

record = read_record(Path("small"))
record.verdict.small.params
print(comparison([Path("small-a"), Path("small-b")]))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shallower.app import quality as qualities
from shallower.core.files import read_json
from shallower.core.text import amount, table
from shallower.errors import CheckpointError, ShallowerError

RESULT_SCHEMA = 2
"""Version of result.json; 1, and none, are read too."""

RESULT = "result.json"
CURVE = "curve.json"

_MOST_POINTS = 10_000
_GREATEST = 2**63
_NOTED_ERROR = re.compile(r"held-out error (\d+(?:\.\d+)?) ?%")
"""How a note says a site's error, where the file has no number for it."""
_COSTS = ("params", "macs", "memory", "latency")


@dataclass(frozen=True)
class Measured:
    """A model: its score, and what it costs.

    Attributes:
        score: on the test set, where there is one; higher is better.
        params, macs: counted.
        memory: bytes of parameters and buffers.
        latency: median seconds of one forward pass; None where it was not measured.
        label: what distinguishes it: "width 48", "3 removed".
        chosen: this is the model that was saved.
        ranked: the score that models are chosen by, where it was taken on other rows than `score`.
    """

    score: float
    params: int
    macs: int
    memory: int
    latency: float | None = None
    label: str = ""
    chosen: bool = False
    ranked: float | None = None

    @property
    def rank(self) -> float:
        """What models are chosen by."""
        if self.ranked is None:
            return self.score
        return self.ranked

    def to_json(self) -> dict[str, Any]:
        """The score and the costs, as plain data."""
        return {name: getattr(self, name) for name in ("score", *_COSTS)}


@dataclass(frozen=True)
class Verdict:
    """A model and the smaller one that was made of it, side by side.

    Attributes:
        dense, small: the two.
        speedup: how many times faster the small one is, the two timed alternately.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data for result.json."""
        speed = {"predicted": self.predicted, "measured": self.speedup, "spread": self.spread}
        return {"dense": self.dense.to_json(), "small": self.small.to_json(), "speed": speed}

    def rows(self, quality: str, name: str, note: str = "") -> list[tuple[str, ...]]:
        """Two rows of `verdict_table`: dense and small."""
        change = f"{_ratio(self.small.params, self.dense.params) - 1:+.0%}"
        speeds = f"{self.predicted:.2f}x", f"{self.speedup:.2f}x"
        return [
            (name, *_cells(quality, self.dense, ""), "", ""),
            (f"  {note}".rstrip(), *_cells(quality, self.small, change), *speeds),
        ]


def verdict_table(quality: str, rows: Sequence[tuple[str, ...]]) -> str:
    """The rows of one or more verdicts under their header."""
    header = ("model", quality, "params", "", "MACs", "latency", "predicted", "measured")
    return table(header, rows, right=range(1, 8))


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
    kind: str = ""
    width: int = 0
    kept: int = 0
    linear: int = 0
    dropped: int = 0
    becomes: str = ""
    params: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Record:
    """What result.json says of a run.

    Attributes:
        model, data, method, target: what was asked for.
        quality: what the score is: "accuracy", "perplexity", ...
        verdict: the model as it was beside the one that was saved; its `speedup` is nan where it was not measured.
        sites: what became of each site.
        options: all options of the run.
        rows: how many rows there were of each split; None for a test split that is not there.
        example: shape of the inputs on which costs and latencies were taken, the rows first; () where unknown.
        machine: where it ran, and with which versions.
        seconds: that it took.
        warnings: what the reader should know before anything else.
        raw: all of the file, for what only some methods write.
    """

    model: str
    data: str
    method: str
    target: str
    quality: str
    verdict: Verdict
    sites: tuple[SiteRow, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int | None] = field(default_factory=dict)
    example: tuple[int, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


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
    data = read_object(path, error)
    try:
        return _checked_record(data)
    except _DamagedError as damage:
        raise error(f"{path}: it does not describe a result: {damage}") from damage


def read_points(directory: Path, error: type[ShallowerError] = CheckpointError) -> list[dict[str, Any]]:
    """The points of the curve of a run, as plain data that `point_of` reads.

    Args:
        directory: of a result.
        error: the kind of error to raise.

    Raises:
        ShallowerError: there is no curve.json in the directory, or it is damaged.
    """
    path = directory / CURVE
    if not path.is_file():
        raise error(f"{directory}: there is no {CURVE}; shallower compress --method structural-dropout writes one")
    data = read_json(path, error=error)
    if isinstance(data, dict):
        data = data.get("points")
    try:
        if not isinstance(data, list) or not 0 < len(data) <= _MOST_POINTS:
            raise _DamagedError("it holds no list of points")
        for number, point in enumerate(data):
            point_of(_mapping(point, f"point {number}"))
    except _DamagedError as damage:
        raise error(f"{path}: not a curve: {damage}") from damage
    return data


def point_of(data: Mapping[str, Any], label: str = "", *, chosen: bool = False) -> Measured:
    """A model of the file: one of the two of result.json, or a point of curve.json."""
    score = _number(data, "score")
    size = "memory"
    if size not in data:
        size = "size"
    tested = _number_or_none(data, "test_score")
    ranked = None
    if tested is not None:
        score, ranked = tested, score
    return Measured(
        score,
        _count(data, "params"),
        _count(data, "macs"),
        _count(data, size),
        _number_or_none(data, "latency", least=0),
        str(data.get("label") or label),
        bool(data.get("chosen", chosen)),
        ranked,
    )


def comparison(directories: Sequence[Path]) -> str:
    """One table of several results, each original model once, before what was made of it.

    Raises:
        CheckpointError: a directory holds no result.
    """
    records = [(directory, read_record(directory)) for directory in directories]
    records.sort(key=lambda pair: _original(pair[1]))
    rows: list[tuple[str, ...]] = []
    original = ""
    for directory, record in records:
        dense, small, quality = record.verdict.dense, record.verdict.small, record.quality
        if original != _original(record):
            original = _original(record)
            rows.append((record.model or "the original", "", *_scored(quality, dense), "", ""))
        change = f"{_ratio(small.params, dense.params) - 1:+.0%}"
        speed = f"{record.verdict.speedup:.2f}x"
        rows.append((f"  {directory}", record.method, *_scored(quality, small), change, speed))
    header = ("model", "method", "score", "", "params", "MACs", "memory", "change", "speed")
    text = table(header, rows, right=(2, 4, 5, 6, 7, 8))
    machines = {json.dumps(record.machine, sort_keys=True) for _, record in records}
    if len(machines) > 1:
        text += "\nmeasured on different machines or with other versions: compare the speeds with care"
    return text


def _scored(quality: str, side: Measured) -> tuple[str, ...]:
    costs = amount(side.params), amount(side.macs), f"{amount(side.memory)}B"
    return (qualities.shown(quality, side.score), quality, *costs)


def _cells(quality: str, side: Measured, change: str) -> tuple[str, ...]:
    latency = ""
    if side.latency is not None:
        latency = qualities.seconds(side.latency)
    return qualities.shown(quality, side.score), amount(side.params), change, amount(side.macs), latency


def _ratio(after: float, before: float) -> float:
    return after / max(1, before)


def _original(record: Record) -> str:
    dense = record.verdict.dense
    return json.dumps([record.model, record.data, record.quality, dense.score, dense.params])


# ---------------------------------------------------------------------------------------------------- reading


def read_object(path: Path, error: type[ShallowerError]) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        ShallowerError: of the kind `error`: it cannot be read, or holds something else.
    """
    data = read_json(path, error=error)
    if not isinstance(data, dict):
        raise error(f"{path}: it holds no object")
    return data


class _DamagedError(ValueError):
    """A value in a file that is missing or not what it should be."""


def _checked_record(data: Mapping[str, Any]) -> Record:
    if data.get("schema", RESULT_SCHEMA) not in (1, RESULT_SCHEMA):
        raise _DamagedError(f"it has schema {data['schema']!r:.20}; this version reads 1 and {RESULT_SCHEMA}")
    options = _mapping(_of(data, "options"), "options")
    asked = {name: str(options.get(name) or "") for name in ("model", "data", "method", "target")}
    quality = str(_of(data, "quality"))
    speed = _mapping(data.get("speed") or {}, "speed")
    speedup = _number_or_none(speed, "measured", least=1e-9)
    verdict = Verdict(
        point_of(_mapping(_of(data, "dense"), "dense"), "as it was"),
        point_of(_mapping(_of(data, "small"), "small"), "saved", chosen=True),
        math.nan if speedup is None else speedup,
        _number_or_none(speed, "spread", least=0) or 0.0,
    )
    sites = _mapping(data.get("sites") or {}, "sites")
    rows = _mapping(data.get("rows") or {}, "rows")
    return Record(
        **asked,
        quality=quality,
        verdict=verdict,
        sites=tuple(_site_record(name, _mapping(site, name)) for name, site in sites.items()),
        options=options,
        rows={name: _count_or_none(rows, name) for name in rows},
        example=_parsed_shape(str(data.get("example") or "")),
        machine=_mapping(data.get("machine") or {}, "machine"),
        seconds=_number_or_none(data, "seconds", least=0),
        warnings=tuple(map(str, _list(data, "warnings"))),
        raw=data,
    )


def _site_record(name: str, data: Mapping[str, Any]) -> SiteRow:
    counts = {key: _count_or_none(data, key) or 0 for key in ("width", "kept", "linear", "dropped")}
    pairs = {key: _number_pair(data, key) for key in ("params", "macs")}
    words = {key: str(data.get(key) or "") for key in ("kind", "becomes", "note")}
    error = _number_or_none(data, "error")
    noted = _NOTED_ERROR.search(words["note"])
    if error is None and noted:
        error = float(noted[1]) / 100
    return SiteRow(name, error=error, **counts, **pairs, **words)  # type: ignore[arg-type]


def _of(data: Mapping[str, Any], name: str) -> Any:
    if name not in data:
        raise _DamagedError(f"{name!r} is missing")
    return data[name]


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _DamagedError(f"{name} is no object")
    return value


def _list(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = data.get(name) or ()
    if not isinstance(value, (list, tuple)):
        raise _DamagedError(f"{name} is not a list")
    return value


def _number(data: Mapping[str, Any], name: str, least: float = -math.inf) -> float:
    value = _of(data, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _DamagedError(f"{name!r} is not a number")
    if not least <= value < math.inf:
        raise _DamagedError(f"{name!r} is out of range")
    return float(value)


def _number_or_none(data: Mapping[str, Any], name: str, least: float = -math.inf) -> float | None:
    if data.get(name) is None:
        return None
    return _number(data, name, least)


def _count(data: Mapping[str, Any], name: str) -> int:
    value = _of(data, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _GREATEST:
        raise _DamagedError(f"{name!r} is not a count")
    return value


def _count_or_none(data: Mapping[str, Any], name: str) -> int | None:
    if data.get(name) is None:
        return None
    return _count(data, name)


def _number_pair(data: Mapping[str, Any], name: str) -> tuple[int, int]:
    values = data.get(name) or (0, 0)
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise _DamagedError(f"{name!r} is not a pair of counts")
    counts = {f"{name} before": values[0], f"{name} after": values[1]}
    return _count(counts, f"{name} before"), _count(counts, f"{name} after")


def _parsed_shape(text: str) -> tuple[int, ...]:
    """The sizes in "32 x 49"; () where the text says none."""
    sizes = text.split(" x ")
    if not all(size.isdecimal() for size in sizes):
        return ()
    shape = tuple(map(int, sizes))
    if math.prod(shape) > 2**31:
        raise _DamagedError(f"an example of {text:.40} is out of range")
    return shape
