"""Another size of a run: a model out of one that was trained at all widths, or squeezed to several sizes.

Neither data nor training is needed; the scores are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from shallower.app.bench import example_of, loaded_with
from shallower.app.compression import TIMING_SECONDS, measured, site_rows
from shallower.app.jobs import Output, task_of, write
from shallower.app.models import LoadedModel, load_model
from shallower.app.results import (
    CURVE,
    FAMILY,
    RESULT,
    CurvePoint,
    Record,
    Verdict,
    read_points,
    read_record,
    verdict_table,
)
from shallower.app.runs.structural_dropout import StructuralDropoutRun, at_point, set_statistics
from shallower.core.codec import encode
from shallower.core.files import read_tensors
from shallower.core.inputs import Inputs
from shallower.errors import CheckpointError, ModelError, TargetError
from shallower.finding.kinds import SiteKind, find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.planning.curve import Curve
from shallower.planning.family import Family
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.saving.sources import LIBRARIES, source_of
from shallower.saving.writing import check_replaceable
from shallower.surgery.applying import apply

_LENGTH = 128
"""Tokens in a row, where the run does not say."""


def pick(
    directory: str | Path,
    target: str | Target,
    output: str | Path | None = None,
    *,
    model: nn.Module | None = None,
) -> nn.Module:
    """The model of another size of a run, in seconds, without data and without training.

        half = sh.pick("out/", target="params:50%")
        sh.pick("out/", "latency:2x", "fast/")

    Args:
        directory: what `compress` wrote, with `sizes` or by `--method structural-dropout`.
        target: of a cost, or how much of the score may be lost; see `Target`.
        output: a folder for the picked model, with its numbers and its report; without one nothing is written.
        model: the model that the run was given, where that is neither a directory, nor a name on the hub, of timm or
            torchvision; of a training at all widths a fresh instance.

    Raises:
        TargetError: no size of the run meets the target.
        CheckpointError: the directory holds no sizes to pick from, or is damaged; or the output holds other things.
        ModelError: the run's model is not where it was, or `model` is missing.
        PlanError: `model` has other weights than the run's.
    """
    target = Target.parse(target)
    folder = None
    if output is not None:
        folder = Path(output).expanduser()
        check_replaceable(folder.resolve())
    given = None
    if model is not None:
        given = LoadedModel(model.eval(), source_of(model))
    picked = _picked_size(Path(directory).expanduser(), target, "", given)
    if folder is not None:
        _write_size(picked, target, folder)
    return picked.model


def pick_into(directory: Path, target: Target, output: Path, *, original: str = "") -> Output:
    """The same for the command line, which says what was picked.

        pick_into(Path("all-widths"), sh.Target.parse("size:50%"), Path("half"))

    Args:
        directory: what `compress` wrote.
        target: of a cost, or how much of the score may be lost.
        output: where to.
        original: the factory of the model, where it is code to be imported.

    Raises:
        CheckpointError: the directory holds no such curve, or the output holds other things.
        TargetError: no point meets the target.
    """
    check_replaceable(output.expanduser().resolve())
    picked = _picked_size(directory.expanduser(), target, original, None)
    record = _write_size(picked, target, output)
    rows = picked.verdict.rows(record.quality, picked.before, picked.chosen.label)
    lines = [
        str(picked.plan),
        "",
        verdict_table(record.quality, rows),
        f"saved in {output}, from the {len(picked.points)} points in {directory / CURVE}",
    ]
    return Output("\n".join(lines), {**encode(record), "output": str(output)})


@dataclass(frozen=True)
class _Picked:
    """What was picked: the model, how it is made, the point of the curve that it is, and what it was picked from."""

    model: nn.Module
    plan: Plan
    chosen: CurvePoint
    points: Sequence[CurvePoint]
    loaded: LoadedModel
    verdict: Verdict
    record: Record
    directory: Path
    before: str


def _picked_size(directory: Path, target: Target, original: str, given: LoadedModel | None) -> _Picked:
    record, points = read_record(directory), read_points(directory)
    point = Curve(tuple(known.point for known in points), record.quality).best(target)
    chosen = next(known for known in points if known.point == point)
    full = max(points, key=lambda known: (known.params, known.macs))
    if (directory / FAMILY).is_dir():
        if chosen is full:
            raise TargetError(f"the target {target}: of the sizes in {directory} only the model as it was meets it")
        loaded, before = given or _squeezed_model(record, original), "dense"
        example = _example_like(directory, record, loaded)
        members = Family.load(directory / FAMILY).members
        # the first point is the model as it was
        plan = members[points.index(chosen) - 1].plan
        small = apply(loaded.model, plan, example).eval()
    elif record.method == StructuralDropoutRun.name:
        loaded, before = given or loaded_with(str(directory), original), "full width"
        example = _example_like(directory, record, loaded)
        kinds: tuple[SiteKind, ...] = ("hidden",)
        if record.options.get("heads"):
            kinds = ("hidden", "heads")
        sites = find_sites(loaded.model, example, kinds=kinds).select(str(record.options.get("sites", "*")))
        small, plan = at_point(loaded.model, sites, point, example)
        if chosen.norms:
            set_statistics(small, read_tensors(directory / Path(chosen.norms).name, error=CheckpointError))
    else:
        raise CheckpointError(
            f"{directory}: this run of {record.method} has one size only; --sizes 5 makes some, and --method "
            f"{StructuralDropoutRun.name} trains all widths"
        )
    times = compare({"dense": loaded.model, "small": small}, example, seconds=TIMING_SECONDS)
    verdict = Verdict(
        measured(full.reported, cost_of(loaded.model, example), times["dense"].latency),
        measured(chosen.reported, cost_of(small, example), times["small"].latency),
        times["small"].speedup,
        times["small"].ratio_spread,
    )
    return _Picked(small, plan, chosen, points, loaded, verdict, record, directory, before)


def _squeezed_model(record: Record, original: str) -> LoadedModel:
    """The model that a run squeezed, with its weights.

    Raises:
        ModelError: nothing says which it was, or it is code, which is only imported when somebody says so.
    """
    name = original or record.model
    library, _, rest = name.partition(":")
    if not name or library == "transformers" or (rest and not original and library not in LIBRARIES):
        raise ModelError(
            f"the sizes are of {record.model or 'a model of your own'}: give that model again, with its weights "
            "(--original package.module:factory; in Python model=)"
        )
    if original:
        return load_model(original)
    return load_model(name, task=record.options.get("task") or task_of(name))


def _example_like(directory: Path, record: Record, loaded: LoadedModel) -> Inputs:
    length = record.options.get("length") or _LENGTH
    if not isinstance(length, int):
        raise CheckpointError(f"{directory / RESULT}: the length {length!r:.20} is not a number of tokens")
    return example_of(loaded, directory, batch=(*record.example, 1)[0] or 1, length=length)


def _write_size(picked: _Picked, target: Target, output: Path) -> Record:
    """The directory of what was picked; what result.json says there."""
    record, verdict = picked.record, picked.verdict
    more = {"target": str(target), "output": str(output), "picked_from": str(picked.directory)}
    own = replace(
        record,
        options={**record.options, **more},
        dense=verdict.dense,
        small=verdict.small,
        speed=verdict.speed,
        sites=site_rows(picked.plan),
        seconds=None,
        summary="",
        alarms=(),
        warnings=(),
        details={},
        certificate=None,
    )
    points = [replace(known, norms="", chosen=known is picked.chosen) for known in picked.points]
    write(picked.model, output, picked.loaded, picked.plan, own, points=points)
    return own
