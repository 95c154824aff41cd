"""What a run leaves beside the weights, in result.json, and how several of them compare.

print(comparison([Path("small-a"), Path("small-b")]))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shallower.core.text import amount, table
from shallower.errors import CheckpointError

SCHEMA = 2
"""Version of result.json; 1 is read too."""

RESULT = "result.json"
CURVE = "curve.json"

_SIDE = ("score", "params", "macs", "memory", "latency")


def read_result(directory: Path) -> dict[str, Any]:
    """What a run wrote of itself.

    Raises:
        CheckpointError: there is no result.json in the directory, or it is damaged or of another version.
    """
    path = directory / RESULT
    try:
        numbers: dict[str, Any] = json.loads(path.read_text())
        if numbers["schema"] not in (1, SCHEMA):
            raise CheckpointError(f"{path}: of schema {numbers['schema']!r:.20}, this version reads 1 and {SCHEMA}")
        for side in (numbers["dense"], numbers["small"]):
            if not all(isinstance(side[name], int | float) for name in _SIDE):
                raise ValueError("a number is missing")
        if not isinstance(numbers["options"], dict) or not isinstance(numbers["speed"]["measured"], int | float):
            raise ValueError("the options or the speed are missing")
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: there is no {RESULT}; a run of shallower writes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the result of a run: {error}") from error
    return numbers


def read_points(directory: Path) -> list[dict[str, Any]]:
    """The points of the curve of a run.

    Raises:
        CheckpointError: there is no curve.json in the directory, or it is damaged.
    """
    path = directory / CURVE
    try:
        data = json.loads(path.read_text())
        points: list[dict[str, Any]] = data["points"] if isinstance(data, dict) else data
        for point in points:
            if not all(isinstance(point[name], int | float) for name in ("score", "params", "macs", "memory")):
                raise ValueError("a number of a point is missing")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: there is no {CURVE}; shallower compress --method structural-dropout writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a curve: {error}") from error
    return points


def show(quality: str, score: float) -> str:
    """A score as people say it: of a perplexity the score is minus its logarithm."""
    if quality == "perplexity":
        return f"{math.exp(min(-score, 700.0)):.4g}"
    return f"{score:.4f}" if quality == "cosine" else f"{score * 100:.2f} %"


def comparison(directories: Sequence[Path]) -> str:
    """One table of several results, each original model once, before what was made of it.

    Raises:
        CheckpointError: a directory holds no result.
    """
    rows: list[tuple[str, ...]] = []
    told: dict[str, Any] = {}
    results = [(directory, read_result(directory)) for directory in directories]
    for directory, numbers in sorted(results, key=lambda pair: _original(pair[1])):
        dense, small, quality = numbers["dense"], numbers["small"], str(numbers["quality"])
        if told.get("original") != _original(numbers):
            told = {"original": _original(numbers)}
            name = str(numbers["options"].get("model", "the original"))
            rows.append((name, "", show(quality, dense["score"]), quality, *_costs(dense), "", ""))
        rows.append(
            (
                f"  {directory}",
                str(numbers["options"].get("method", "")),
                show(quality, small["score"]),
                quality,
                *_costs(small),
                f"{small['params'] / dense['params'] - 1:+.0%}",
                f"{numbers['speed']['measured']:.2f}x",
            )
        )
    header = ("model", "method", "score", "", "params", "MACs", "memory", "change", "speed")
    lines = [table(header, rows, right=(2, 4, 5, 6, 7, 8))]
    machines = {json.dumps(numbers.get("machine"), sort_keys=True) for _, numbers in results}
    if len(machines) > 1:
        lines.append("measured on different machines or with other versions: compare the speeds with care")
    return "\n".join(lines)


def _costs(side: Mapping[str, Any]) -> tuple[str, str, str]:
    return amount(side["params"]), amount(side["macs"]), f"{amount(side['memory'])}B"


def _original(numbers: Mapping[str, Any]) -> str:
    options, dense = numbers["options"], numbers["dense"]
    return json.dumps([options.get("model"), options.get("data"), numbers["quality"], dense["score"], dense["params"]])
