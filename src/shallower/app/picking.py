"""`shallower pick`: a smaller model out of one that was trained at all widths, without training and without data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shallower.app.bench import example_of, loaded_with
from shallower.app.compression import Side, Verdict, cost_of, site_table, verdict_table
from shallower.app.jobs import Told, write
from shallower.app.results import CURVE, read_points, read_result
from shallower.app.runs.structural_dropout import StructuralDropoutRun, at_point, set_statistics
from shallower.app.tasks import task_named
from shallower.errors import CheckpointError
from shallower.finding.matching import find_sites
from shallower.measuring.measurement import compare
from shallower.planning.curve import Curve
from shallower.planning.targets import Target
from shallower.saving.writing import check_replaceable


def pick(directory: Path, target: Target, output: Path, *, original: str = "") -> Told:
    """Write the point of a curve that suits the target best as a model of its own.

        pick(Path("all-widths"), Target.parse("memory:50%"), Path("half"))

    Args:
        directory: what `compress --method structural-dropout` wrote.
        target: of a cost, or how much of the score may be lost.
        output: where to.
        original: the factory of the model, where it is code to be imported.

    Raises:
        CheckpointError: the directory holds no such curve, or the output holds other things.
        TargetError: no point meets the target.
    """
    check_replaceable(output.expanduser().resolve())
    directory = directory.expanduser()
    numbers, points = read_result(directory), read_points(directory)
    options = numbers["options"]
    if options.get("method") != StructuralDropoutRun.name:
        raise CheckpointError(
            f"{directory}: made by {options.get('method')}, which has one size only; "
            f"--method {StructuralDropoutRun.name} trains all of them"
        )
    curve = Curve.from_json({"schema": 1, "points": points, "name": numbers["quality"]})
    point = curve.best(target)
    chosen = next(data for data in points if data["label"] == point.label and data["params"] == point.cost.params)
    full = max(points, key=lambda data: (data["params"], data["macs"]))
    loaded = loaded_with(str(directory), original)
    example = example_of(loaded, directory, batch=_rows(numbers), length=int(options.get("length") or 128))
    sites = find_sites(loaded.model, example, heads=bool(options.get("heads"))).select(str(options.get("sites", "*")))
    small, plan = at_point(loaded.model, sites, point, example)
    if "norms" in chosen:
        _set_statistics(small, directory, str(chosen["norms"]))
    times = compare({"dense": loaded.model, "small": small}, example)
    sides = [
        Side(data.get("test_score", data["score"]), cost.params, cost.macs, cost.memory, times[name].latency)
        for data, name, cost in (
            (full, "dense", cost_of(loaded.model, example)),
            (chosen, "small", cost_of(small, example)),
        )
    ]
    verdict = Verdict(sides[0], sides[1], times["small"].speedup, times["small"].ratio_spread)
    marked = [{**data, "chosen": data is chosen} for data in points]
    told = {
        **{key: numbers[key] for key in ("schema", "quality", "classes", "rows", "example", "machine")},
        "options": {**options, "target": str(target), "output": str(output), "picked_from": str(directory)},
        **verdict.to_json(),
        "sites": {site.pop("name"): site for site in site_table(plan)},
        "warnings": [],
    }
    plain = [{key: value for key, value in data.items() if key != "norms"} for data in marked]
    write(small, output, loaded, plan, told, points=plain)
    task = task_named("causal-lm" if numbers["quality"] == "perplexity" else "text-classification")
    lines = [
        str(plan),
        "",
        verdict_table(task.quality, verdict.rows(task, "full width", point.label)),
        f"saved in {output}, from the {len(points)} points in {directory / CURVE}",
    ]
    return Told("\n".join(lines), {**told, "output": str(output)})


def _set_statistics(model: nn.Module, directory: Path, name: str) -> None:
    path = directory / Path(name).name
    try:
        set_statistics(model, load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _rows(numbers: Mapping[str, Any]) -> int:
    """Of the inputs on which latencies were taken."""
    first = str(numbers.get("example", "")).split(" x ")[0]
    return int(first) if first.isdigit() and int(first) > 0 else 1
