"""`shallower pick`: a smaller model out of one that was trained at all widths, without training and without data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shallower.app.bench import example_of, loaded_with
from shallower.app.compression import measured, site_table
from shallower.app.jobs import Output, write
from shallower.app.results import CURVE, RESULT, Verdict, point_of, read_points, read_record, verdict_table
from shallower.app.runs.structural_dropout import StructuralDropoutRun, at_point, set_statistics
from shallower.core.files import read_tensors
from shallower.errors import CheckpointError
from shallower.finding.matching import find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.planning.curve import Curve
from shallower.planning.targets import Target
from shallower.saving.writing import check_replaceable

_LENGTH = 128
"""Tokens in a row, where the run does not say."""


def pick(directory: Path, target: Target, output: Path, *, original: str = "") -> Output:
    """Write the point of a curve that suits the target best as a model of its own.

        pick(Path("all-widths"), Target.parse("size:50%"), Path("half"))

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
    record, points = read_record(directory), read_points(directory)
    options = record.options
    if record.method != StructuralDropoutRun.name:
        raise CheckpointError(
            f"{directory}: made by {record.method}, which has one size only; "
            f"--method {StructuralDropoutRun.name} trains all of them"
        )
    curve = Curve.from_json({"schema": 1, "points": points, "name": record.quality})
    point = curve.best(target)
    chosen = next(data for data in points if data["label"] == point.label and data["params"] == point.cost.params)
    full = max(points, key=lambda data: (data["params"], data["macs"]))
    loaded = loaded_with(str(directory), original)
    length = options.get("length") or _LENGTH
    if not isinstance(length, int):
        raise CheckpointError(f"{directory / RESULT}: the length {length!r:.20} is not a number of tokens")
    example = example_of(loaded, directory, batch=(*record.example, 1)[0] or 1, length=length)
    sites = find_sites(loaded.model, example, heads=bool(options.get("heads"))).select(str(options.get("sites", "*")))
    small, plan = at_point(loaded.model, sites, point, example)
    if "norms" in chosen:
        _set_statistics(small, directory, str(chosen["norms"]))
    times = compare({"dense": loaded.model, "small": small}, example)
    dense, picked = (
        measured(point_of(data).score, cost_of(model, example), times[name].latency)
        for name, model, data in (("dense", loaded.model, full), ("small", small, chosen))
    )
    verdict = Verdict(dense, picked, times["small"].speedup, times["small"].ratio_spread)
    numbers = {
        **{key: record.raw.get(key) for key in ("schema", "quality", "classes", "rows", "example", "machine")},
        "options": {**options, "target": str(target), "output": str(output), "picked_from": str(directory)},
        **verdict.to_json(),
        "sites": site_table(plan),
        "warnings": [],
    }
    written = []
    for data in points:
        others = {key: value for key, value in data.items() if key != "norms"}
        written.append({**others, "chosen": data is chosen})
    write(small, output, loaded, plan, numbers, points=written)
    lines = [
        str(plan),
        "",
        verdict_table(record.quality, verdict.rows(record.quality, "full width", point.label)),
        f"saved in {output}, from the {len(points)} points in {directory / CURVE}",
    ]
    return Output("\n".join(lines), {**numbers, "output": str(output)})


def _set_statistics(model: nn.Module, directory: Path, name: str) -> None:
    set_statistics(model, read_tensors(directory / Path(name).name, error=CheckpointError))
