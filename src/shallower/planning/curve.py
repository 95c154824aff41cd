"""What each choice costs and how good it is: a curve to pick a point from.

curve = method.curve(score, points=8)
print(curve.front())                    # the choices that no other one beats
point = curve.best("size:50%")
curve.save("curve.json");  curve.save("curve.csv");  curve.plot("curve.png")
"""

from __future__ import annotations

import csv
import io
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from shallower.core.codec import Bounds, decode, known_fields
from shallower.core.files import atomic, read_json, write_json, write_text
from shallower.core.text import amount, table
from shallower.errors import MethodError, TargetError
from shallower.planning.costs import Cost
from shallower.planning.targets import Target

CURVE_SCHEMA = 2
"""Version of curve.json; 1, which called `size` memory, is read too."""

_EARLIER_NAMES = {"memory": "size"}

_COST, _SCORE = operator.itemgetter(0), operator.itemgetter(1)
"""The axes of a point that is drawn."""


@dataclass(frozen=True)
class Point:
    """One choice.

    Attributes:
        label: for people: "50%", "searched 3".
        widths: channels of every site, by its name.
        score: of the model at this choice, higher is better.
        cost: params, MACs on the example inputs, bytes, the KV cache, and the measured latency (seconds; None where
            not measured).
        spread: interquartile range of the latency, seconds.
    """

    label: str
    widths: Mapping[str, int]
    score: float
    cost: Cost
    spread: float | None = None

    def beats(self, other: Point) -> bool:
        """Whether it is nowhere worse - in score, params, MACs, size and KV cache - and somewhere better."""
        own, theirs = self._goods(), other._goods()
        return all(map(operator.ge, own, theirs)) and own != theirs

    def _goods(self) -> tuple[float, ...]:
        cost = self.cost
        return self.score, -cost.params, -cost.macs, -cost.size, -(cost.kv or 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        cost = self.cost
        return {
            "label": self.label,
            "score": self.score,
            "params": cost.params,
            "macs": cost.macs,
            "size": cost.size,
            "kv": cost.kv,
            "latency": cost.latency,
            "spread": self.spread,
            "widths": dict(self.widths),
        }


@dataclass(frozen=True)
class Curve:
    """Points, the whole model among them.

    Attributes:
        points: in the order of falling params.
        name: of what was scored, for the axis: "accuracy".
    """

    points: tuple[Point, ...]
    name: str = field(default="score")

    def __post_init__(self) -> None:
        """Order the points.

        Raises:
            MethodError: there is none, or a score is not a number.
        """
        if not self.points or any(math.isnan(p.score) for p in self.points):
            raise MethodError("a curve has at least one point, and every score is a number")
        ordered = sorted(self.points, key=lambda p: (-p.cost.params, -p.cost.macs, -p.score))
        object.__setattr__(self, "points", tuple(ordered))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    @property
    def full(self) -> Point:
        """The whole model: the point with the most parameters."""
        return self.points[0]

    def front(self) -> Curve:
        """The points that no other one beats (the Pareto front over score, params, MACs, size and KV cache)."""
        return Curve(tuple(p for p in self.points if not any(q.beats(p) for q in self.points)), self.name)

    def best(self, target: str | Target) -> Point:
        """The best point for a target.

        Args:
            target: of a cost ("size:50%", "latency:1.5x"): the highest score that meets it, the cheaper one of two
                equals. "drop:1%": the point with the fewest parameters whose score is high enough.

        Raises:
            TargetError: no point meets it; the error says how far they go.
        """
        target = Target.parse(target)
        if target.unit == "drop":
            floor = target.floor(self.full.score)
            good = [p for p in self.points if p.score >= floor]
            return min(good, key=lambda p: (p.cost.params, p.cost.macs, -p.score))
        if target.unit == "latency" and self.full.cost.latency is None:
            raise TargetError(f"the target {target} needs measured latencies: curve(..., example_inputs=...)")
        counted, met = [], []
        for p in self.points:
            if target.unit == "latency" and p.cost.latency is None:
                continue
            counted.append(target.amount_of(p.cost))
            if target.met(self.full.cost, p.cost):
                met.append(p)
        if not met:
            before = target.amount_of(self.full.cost)
            wanted, least = target.limit(self.full.cost) / before, min(counted) / before
            raise TargetError(
                f"the target {target} asks for {wanted:.1%} of the model's {target.unit}; the smallest point of the "
                f"curve has {least:.1%}. Ask for less, or train with a smaller lower bound or at more sites"
            )
        return max(met, key=lambda p: (p.score, -target.amount_of(p.cost)))

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; `Curve.from_json` reads it back."""
        return {"schema": CURVE_SCHEMA, "name": self.name, "points": [p.to_json() for p in self.points]}

    @classmethod
    def from_json(cls, data: Any) -> Curve:
        """The curve that `to_json` described; keys that it does not know are passed over.

        Raises:
            MethodError: it is not the description of a curve.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("points"), list):
            raise MethodError("this is not the description of a curve: it is no object with points")
        if data.get("schema") not in (1, CURVE_SCHEMA):
            raise MethodError(f"a curve of schema {data.get('schema')!r:.20}; this version reads 1 and {CURVE_SCHEMA}")
        points = tuple(_point(item, f"curve.points[{i}]") for i, item in enumerate(data["points"]))
        return cls(points, str(data.get("name", "score")))

    def save(self, path: str | Path) -> Path:
        """Write the points as JSON, or as CSV where the name ends in .csv, at once or not at all.

        Raises:
            MethodError: the name ends in something else, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise MethodError(f"{path}: a curve is saved as .json or .csv")
        if path.suffix == ".csv":
            write_text(path, self._csv(), error=MethodError)
        else:
            write_json(path, self.to_json(), error=MethodError)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Read the JSON that `save` wrote.

        Raises:
            MethodError: there is no such file, or it holds something else.
        """
        data = read_json(Path(path), error=MethodError)
        return cls.from_json(data)

    def plot(self, path: str | Path, by: str = "params") -> Path:
        """Draw score against cost, all points and the front, with matplotlib (an optional extra).

        Args:
            path: of the picture; its ending says which kind (.png, .svg, .pdf).
            by: "params", "macs", "size" or "latency".

        Raises:
            MethodError: matplotlib is not installed, or the cost is unknown or was not measured.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MethodError("plotting needs matplotlib: pip install shallower[plot]") from error
        if by not in ("params", "macs", "size", "latency"):
            raise MethodError(f"by={by!r}: choose params, macs, size or latency")
        front, beaten = self._shown(by)
        if not (front or beaten):
            raise MethodError("no latency was measured: curve(..., example_inputs=...)")
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.scatter(list(map(_COST, beaten)), list(map(_SCORE, beaten)), c="0.7")
        axes.plot(list(map(_COST, front)), list(map(_SCORE, front)), "o-")
        axes.set_xlabel({"latency": "seconds for one pass", "size": "bytes", "macs": "MACs"}.get(by, by))
        axes.set_ylabel(self.name)
        axes.grid(alpha=0.3)
        path = Path(path)
        with atomic(path, error=MethodError) as partial:
            figure.savefig(partial, dpi=150, format=path.suffix[1:] or "png")
        return path

    def _shown(self, by: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Cost and score of the points on the front, in the order of the cost, and of the others."""
        best = set(map(id, self.front()))
        front, beaten = [], []
        for p in self.points:
            cost = getattr(p.cost, by)
            if cost is None:
                continue
            if id(p) in best:
                front.append((cost, p.score))
            else:
                beaten.append((cost, p.score))
        return sorted(front), beaten

    def __str__(self) -> str:
        """A table."""
        header = ("", self.name, "params", "MACs", "size", "latency", "widths")
        rows = []
        for p in self.points:
            latency = ""
            if p.cost.latency is not None:
                latency = f"{p.cost.latency * 1e3:.2f} ms"
            counts = (amount(p.cost.params), amount(p.cost.macs), f"{amount(p.cost.size)}B", latency)
            rows.append((p.label, f"{p.score:.4g}", *counts, _widths_text(p.widths.values())))
        return table(header, rows, right=range(1, 6))

    __repr__ = __str__

    def _csv(self) -> str:
        names = list(self.full.widths)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["label", "score", "params", "macs", "size", "kv", "latency", *names])
        for p in self.points:
            cost = p.cost
            widths = [p.widths[name] for name in names]
            writer.writerow([p.label, p.score, cost.params, cost.macs, cost.size, cost.kv, cost.latency, *widths])
        return out.getvalue()


Whole = Annotated[int, Bounds(0, 1 << 53)]


@dataclass(frozen=True)
class StoredPoint:
    """A `Point` in curve.json."""

    label: Annotated[str, Bounds(0, 1000)]
    score: float
    params: Whole
    macs: Whole
    size: Whole
    widths: Mapping[str, Whole]
    kv: Whole | None = None
    latency: Annotated[float, Bounds(0, 1e9)] | None = None
    spread: Annotated[float, Bounds(0, 1e9)] | None = None


def _point(data: Any, at: str) -> Point:
    """The point that `Point.to_json` described; other keys are passed over."""
    if isinstance(data, Mapping):
        data = known_fields(StoredPoint, data, _EARLIER_NAMES)
    stored = decode(StoredPoint, data, at=at, error=MethodError)
    cost = Cost(stored.params, stored.macs, stored.size, stored.latency, stored.kv)
    return Point(stored.label, stored.widths, stored.score, cost, stored.spread)


def _widths_text(widths: Iterable[int], most: int = 8) -> str:
    shown = list(map(str, widths))
    text = " ".join(shown[:most])
    if len(shown) > most:
        text += f" and {len(shown) - most} more"
    return text
