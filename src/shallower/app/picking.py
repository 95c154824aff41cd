"""`shallower pick`: a smaller model out of one that was trained at all widths, without training and without data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shallower.app.bench import example_of, loaded_with
from shallower.app.compression import measured, site_rows
from shallower.app.jobs import Output, write
from shallower.app.results import CURVE, RESULT, Verdict, read_points, read_record, verdict_table
from shallower.app.runs.structural_dropout import StructuralDropoutRun, at_point, set_statistics
from shallower.core.codec import encode
from shallower.core.files import read_tensors
from shallower.errors import CheckpointError
from shallower.finding.kinds import SiteKind, find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.planning.curve import Curve
from shallower.planning.targets import Target
from shallower.saving.writing import check_replaceable

_LENGTH = 128
"""Tokens in a row, where the run does not say."""


def pick(directory: Path, target: Target, output: Path, *, original: str = "") -> Output:
    """Write the point of a curve that suits the target best as a model of its own.

        pick(Path("all-widths"), sh.Target.parse("size:50%"), Path("half"))

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
    point = Curve(tuple(known.point for known in points), record.quality).best(target)
    chosen = next(known for known in points if known.point == point)
    full = max(points, key=lambda known: (known.params, known.macs))
    loaded = loaded_with(str(directory), original)
    length = options.get("length") or _LENGTH
    if not isinstance(length, int):
        raise CheckpointError(f"{directory / RESULT}: the length {length!r:.20} is not a number of tokens")
    example = example_of(loaded, directory, batch=(*record.example, 1)[0] or 1, length=length)
    kinds: tuple[SiteKind, ...] = ("hidden",)
    if options.get("heads"):
        kinds = ("hidden", "heads")
    sites = find_sites(loaded.model, example, kinds=kinds).select(str(options.get("sites", "*")))
    small, plan = at_point(loaded.model, sites, point, example)
    if chosen.norms:
        set_statistics(small, read_tensors(directory / Path(chosen.norms).name, error=CheckpointError))
    times = compare({"dense": loaded.model, "small": small}, example)
    verdict = Verdict(
        measured(full.reported, cost_of(loaded.model, example), times["dense"].latency),
        measured(chosen.reported, cost_of(small, example), times["small"].latency),
        times["small"].speedup,
        times["small"].ratio_spread,
    )
    picked = replace(
        record,
        options={**options, "target": str(target), "output": str(output), "picked_from": str(directory)},
        dense=verdict.dense,
        small=verdict.small,
        speed=verdict.speed,
        sites=site_rows(plan),
        seconds=None,
        warnings=(),
        details={},
    )
    written = [replace(known, norms="", chosen=known is chosen) for known in points]
    write(small, output, loaded, plan, picked, points=written)
    lines = [
        str(plan),
        "",
        verdict_table(record.quality, verdict.rows(record.quality, "full width", point.label)),
        f"saved in {output}, from the {len(points)} points in {directory / CURVE}",
    ]
    return Output("\n".join(lines), {**encode(picked), "output": str(output)})
