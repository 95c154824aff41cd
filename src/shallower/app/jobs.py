"""One run of `shallower compress`: from the names of a model and of data to a directory with the result."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallower.app.batching import make_batches
from shallower.app.compression import MethodRun, Result, Work, preview, run_method, say_nothing, site_rows
from shallower.app.data.rows import Rows, read_rows
from shallower.app.deciding.clock import Clock
from shallower.app.models import LoadedModel, config_of, load_model
from shallower.app.options import MINUTES, TASK_NAMES, DataOptions, RunOptions, Scope, TaskName, TrainingOptions
from shallower.app.report.card import write_card
from shallower.app.report.page import write_report
from shallower.app.report.stock import stock_sentence
from shallower.app.results import CURVE, FAMILY, RESULT, CurveFile, CurvePoint, Record, points_table, verdict_table
from shallower.app.tasks import task_named
from shallower.core.codec import decode, encode
from shallower.core.files import read_json, write_json, write_tensors
from shallower.core.inputs import model_device
from shallower.core.text import amount, table
from shallower.core.trees import tensors
from shallower.errors import CheckpointError, DataError, ModelError, ShallowerError, TargetError
from shallower.planning.costs import Cost
from shallower.planning.family import Family
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.saving.checkpoint import check_source, read_source, save
from shallower.saving.description import DESCRIPTION
from shallower.saving.writing import check_replaceable
from shallower.training import Recipe

_ENDINGS: Mapping[str, TaskName] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "Model": "feature-extraction",
}
"""What a class of Transformers is for, by how its name ends; the longest ending counts."""

_NOTE = "job.json"
_LR = 1e-4


@dataclass(frozen=True)
class Job:
    """Everything that `shallower compress` was asked for; the options' own fields say what they mean.

    Attributes:
        model, data: as on the command line.
        target: what the result has to reach.
        output: folder for the result.
        method: with its own options.
        minutes: that all of it may take; methods that are told how long to train do not look at them.
    """

    model: str
    data: str
    target: Target | None
    output: Path
    method: MethodRun
    scope: Scope = Scope()
    rows: DataOptions = DataOptions()
    training: TrainingOptions = TrainingOptions()
    machine: RunOptions = RunOptions()
    minutes: float = MINUTES

    @property
    def progress(self) -> Path:
        """Where the state of an unfinished run is kept."""
        return progress_of(self.output)

    @cached_property
    def options(self) -> dict[str, Any]:
        """All of it as plain data."""
        asked = {"model": self.model, "data": self.data, "target": str(self.target or ""), "output": str(self.output)}
        for part in (self.scope, self.rows, self.training, self.machine, self.method):
            asked |= asdict(part)  # type: ignore[arg-type]
        return {**asked, "method": self.method.name, "minutes": self.minutes}


@dataclass(frozen=True)
class Output:
    """What a command prints: text for people, plain data for --json, and what nobody may miss."""

    text: str
    data: Mapping[str, Any]
    alarms: tuple[str, ...] = ()


def run(job: Job, *, resume: bool = True, tell: Callable[[str], object] = say_nothing) -> Output:
    """Do a job. The directory of the result appears at the end, whole.

    Args:
        job: what to do.
        resume: continue an interrupted run of the same job.
        tell: is told what is being done.

    Raises:
        ShallowerError: the first thing that is wrong, before anything is written.
    """
    clock = Clock.begun(job.minutes)
    check_replaceable(job.output.expanduser().resolve())
    task = job.scope.task or task_of(job.model)
    device = device_named(job.machine.device)
    with checkpoints_beside(job.output, job.options, resume) as checkpoints:
        loaded, work = _prepared(job, task, device)
        result = run_method(replace(work, checkpoints=checkpoints, clock=clock, tell=tell), job.method)
        remarks = (*work.remarks, *result.remarks)
        record = record_of(result, job.options, seconds=clock.spent, warnings=remarks)
        outcome = result.outcome
        outcome.model.to("cpu", loaded.dtype)
        write_result(result, job.output, loaded, record)
    return Output(_text(job, loaded, work, result), {**encode(record), "output": str(job.output)}, result.alarms)


def dry_run(job: Job) -> Output:
    """What a job would do and save; nothing is written.

    Raises:
        ShallowerError: the first thing that is wrong.
    """
    check_replaceable(job.output.expanduser().resolve())
    _, work = _prepared(job, job.scope.task or task_of(job.model), device_named(job.machine.device))
    plan, before, after = preview(work, job.method)
    data = {
        "dry_run": True,
        "options": job.options,
        "before": asdict(before),
        "after": asdict(after),
        "sites": encode(site_rows(plan)),
        "warnings": list(work.remarks),
    }
    lines = [str(plan), _savings(before, after), *work.remarks, f"dry run: nothing was written to {job.output}"]
    return Output("\n".join(lines), data)


def write(
    model: nn.Module,
    output: Path,
    loaded: LoadedModel,
    plan: Plan,
    record: Record,
    *,
    points: Sequence[CurvePoint] = (),
    files: Mapping[str, Mapping[str, Tensor]] | None = None,
    family: Family | None = None,
) -> None:
    """Write the directory of a result: weights, tokenizer, plan, numbers, curve, report and model card.

    Args:
        model: the result.
        output: the directory; it appears whole or not at all.
        loaded: the model it was made of.
        plan: how it was made.
        record: result.json.
        points: of the curve, where there is one.
        files: more tensors, by the name of the file.
        family: plans of the points.
    """

    def beside(directory: Path) -> None:
        plan.save(directory)
        write_json(directory / RESULT, encode(record), error=CheckpointError)
        if points:
            curve = CurveFile(record.quality, tuple(points))
            write_json(directory / CURVE, encode(curve), error=CheckpointError)
        for name, values in (files or {}).items():
            write_tensors(directory / name, values, error=CheckpointError)
        if family is not None:
            family.save(directory / FAMILY)
        write_report(directory, at=output)
        write_card(directory, at=output)

    save(model, output, loaded.source, loaded.processor, beside=beside)


def write_result(result: Result, output: Path, loaded: LoadedModel, record: Record) -> None:
    """Write the directory of what `run_method` returned; see `write`."""
    made = result.outcome
    more: dict[str, Any] = {"points": made.points, "files": made.files, "family": made.family}
    write(made.model, output, loaded, made.plan, record, **more)


def task_of(model: str) -> TaskName:
    """What a model was made for, as far as its name or its config says, here or on the hub.

    Raises:
        ModelError: neither does, or there is no such model.
    """
    path = Path(model).expanduser()
    source = model
    if (path / DESCRIPTION).is_file():
        source = read_source(path)
    library, _, rest = source.partition(":")
    if library in ("timm", "torchvision"):
        return "image-classification"
    config = config_of(model)
    architectures = config.get("architectures") or []
    if library == "transformers":
        architectures = [rest.partition("?")[0]]
    for architecture in architectures:
        known = [ending for ending in _ENDINGS if str(architecture).endswith(ending)]
        if known:
            task = _ENDINGS[max(known, key=len)]
            if task == "feature-extraction" and "image_size" in config:
                return "image-feature-extraction"
            return task
    raise ModelError(f"{model} does not say what it was made for: choose --task {', '.join(TASK_NAMES)}")


def device_named(name: str) -> torch.device:
    """What --device means here.

    Raises:
        ShallowerError: there is no such device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ShallowerError("--device cuda: there is no CUDA device here; choose cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda")


def record_of(result: Result, options: Mapping[str, Any], *, seconds: float, warnings: Sequence[str] = ()) -> Record:
    """What result.json says of a run.

    Args:
        result: of the run.
        options: what it was asked for.
        seconds: that it took.
        warnings: what people should know of it.
    """
    device = model_device(result.model)
    name = device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    shape: tuple[int, ...] = ()
    batches = result.batches
    for first in islice(tensors(batches.example), 1):
        shape = tuple(first.shape)
    verdict, details = result.verdict, dict(result.outcome.details)
    if result.uncertified:
        details["uncertified"] = result.uncertified
    return Record(
        dict(options),
        result.task.quality,
        verdict.dense,
        verdict.small,
        verdict.speed,
        site_rows(result.outcome.plan),
        batches.counts,
        shape,
        batches.classes or None,
        machine={
            "processor": platform.processor() or platform.machine(),
            "device": name,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "shallower": version("shallower"),
        },
        seconds=seconds,
        summary=result.summary,
        alarms=result.alarms,
        warnings=tuple(warnings),
        details=details,
        certificate=result.certificate,
    )


def _check_options(job: Job, task: TaskName) -> None:
    """Refuse options that mean nothing for the task, before anything is read."""
    images, classes, rows = "image" in task, task.endswith("classification"), job.rows
    for option, given, means in (
        ("--text-column", rows.text_column, not images),
        ("--length", rows.length, not images),
        ("--image-column", rows.image_column, images),
        ("--image-size", rows.image_size, images),
        ("--augment", job.training.augment, images),
        ("--label-column", rows.label_column, classes),
    ):
        if given and not means:
            raise DataError(f"{option} means nothing for {task}: leave it out, or choose another --task")


def _prepared(job: Job, name: TaskName, device: torch.device) -> tuple[LoadedModel, Work]:
    """The model, and the work on it: the data read, the options checked, everything tried that is cheap to try."""
    _check_options(job, name)
    trains = job.method.needs_labels or job.training.dense_epochs > 0
    rows = read_rows(job.data, name, job.rows, seed=job.machine.seed, need_labels=trains)
    if job.scope.quality_floor is not None:
        # Refused, where it means nothing, before the model is loaded.
        task_named(name, labelled=rows.labels is not None).score_of(job.scope.quality_floor)
    torch.manual_seed(job.machine.seed)
    loaded, new_head = _model(job.model, name, rows)
    remarks = list(rows.remarks)
    _check_weights(loaded.model)
    loaded = _savable(loaded, remarks)
    # Training and calibration want at least float32.
    loaded.model.to(device, torch.promote_types(loaded.dtype, torch.float32))
    reading: dict[str, Any] = {"augment": job.training.augment, "seed": job.machine.seed}
    reading["learns"] = job.training.dense_epochs > 0
    try:
        batches = make_batches(rows, name, loaded, job.rows, **reading)
    except DataError as error:
        if trains or job.rows.label_column or rows.labels is None:
            raise
        rows = rows.unlabelled()
        batches = make_batches(rows, name, loaded, job.rows, **reading)
        remarks.append(f"the labels were not used: {error}")
    task = task_named(name, labelled=rows.labels is not None)
    if rows.labels is None and name != "causal-lm":
        remarks.append(f"without labels, quality is the {task.quality} of the answers with the original's")
    if new_head and not job.training.dense_epochs and rows.labels is not None:
        remarks.append(
            "the head was new, so the dense score says little; --dense-epochs trains the unchanged model first"
        )
    floor = job.scope.quality_floor
    if floor is not None:
        floor = task.score_of(floor)
    training = job.training
    lr = training.lr
    if lr is None:
        lr = _LR
    recipe = Recipe(training.epochs, lr, warmup=0.1, precision=training.precision, seed=job.machine.seed)
    work = Work(
        loaded.model,
        batches,
        task,
        job.target,
        recipe,
        training.lr,
        training.dense_epochs,
        floor,
        job.scope.sites,
        cpu=device.type == "cpu",
        remarks=tuple(remarks),
    )
    return loaded, work


def _savable(loaded: LoadedModel, remarks: list[str]) -> LoadedModel:
    """The model with a source that can be saved, found out before any work; a source that cannot be built is left out.

    Raises:
        CheckpointError: the model cannot be saved at all.
    """
    try:
        check_source(loaded.model, loaded.source)
    except CheckpointError as error:
        if not loaded.source:
            raise
        loaded = replace(loaded, source="")
        check_source(loaded.model, "")
        remarks.append(f"the result is read with shallower.load(directory, model=a fresh instance): {error}")
    return loaded


def _check_weights(model: nn.Module) -> None:
    """Raise ModelError where a model has no weights."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError("the model has no weights: its parameters are on the meta device; load them first")


def _model(spec: str, task: TaskName, rows: Rows) -> tuple[LoadedModel, bool]:
    """The model with a head for the task, and whether that is new: it then has as many outputs as the data classes."""
    loaded = load_model(spec, task=task)
    config = getattr(loaded.model, "config", None)
    made_for = getattr(config, "architectures", None) or ()
    saved = (Path(spec).expanduser() / DESCRIPTION).is_file()
    headless = task in ("feature-extraction", "image-feature-extraction")
    new_head = config is not None and not saved and not headless and type(loaded.model).__name__ not in made_for
    if not new_head or rows.labels is None:
        return loaded, new_head
    loaded = load_model(spec, task=task, num_labels=rows.labels.count)
    if rows.labels.names:
        named: Any = loaded.model.config
        named.id2label = dict(enumerate(rows.labels.names))
        named.label2id = {name: number for number, name in enumerate(rows.labels.names)}
    return loaded, True


@dataclass(frozen=True)
class _Note:
    """What lies in the folder of an unfinished run: which run it is."""

    fingerprint: str
    options: Mapping[str, Any] = field(default_factory=dict)


def progress_of(output: Path) -> Path:
    """Where the state of an unfinished run is kept, beside its output."""
    output = output.expanduser().resolve()
    return output.with_name(f".{output.name}.progress")


@contextmanager
def checkpoints_beside(output: Path, options: Mapping[str, Any], resume: bool = True) -> Iterator[Path]:
    """The folder for the state of a run. It stays where the run was interrupted, so that it can continue.

    Args:
        output: of the run.
        options: it continues only as a run with the same ones, but for the output.
        resume: continue; if not, start over.

    Raises:
        CheckpointError: the folder belongs to another run, or cannot be written.
    """
    folder = progress_of(output)
    note = folder / _NOTE
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    asked = {name: value for name, value in options.items() if name != "output"}
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    _check_same(note, fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    write_json(note, encode(_Note(fingerprint, options)), error=CheckpointError)
    try:
        yield folder
    except ShallowerError as error:
        # What was trained towards a target out of reach is of no use; before other errors it may have taken long.
        if isinstance(error, TargetError) or list(folder.iterdir()) == [note]:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _check_same(note: Path, fingerprint: str) -> None:
    """Raise CheckpointError where the folder belongs to another run, or its note is damaged."""
    if not note.exists():
        return
    try:
        found = decode(_Note, read_json(note, error=CheckpointError), at=str(note), error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --fresh starts over") from error
    if found.fingerprint != fingerprint:
        raise CheckpointError(
            f"{note.parent} belongs to an interrupted run with other options: repeat that command, or add --fresh"
        )


def _text(job: Job, loaded: LoadedModel, work: Work, result: Result) -> str:
    output = str(job.output)
    again = ""
    if not loaded.source:
        again = ", model=a fresh instance of the original model"
    task, outcome = result.task, result.outcome
    made = str(outcome.plan)
    if not len(outcome.plan):
        made = points_table(task.quality, outcome.points)
    certified = f"not certified: {result.uncertified}"
    if result.certificate is not None:
        certified = str(result.certificate)
    lines = [
        made,
        "",
        verdict_table(task.quality, result.verdict.rows(task.quality, "dense", outcome.note)),
        certified,
        *work.remarks,
        *result.remarks,
        f"saved in {output}; load it with shallower.load({output!r}{again})",
        *filter(None, [stock_sentence(job.output.expanduser())]),
        "",
        result.summary,
    ]
    return "\n".join(lines)


def _savings(before: Cost, after: Cost) -> str:
    rows = []
    for unit, was, now, suffix in (
        ("params", before.params, after.params, ""),
        ("MACs", before.macs, after.macs, ""),
        ("size", before.size, after.size, "B"),
    ):
        rows.append((unit, f"{amount(was)}{suffix}", f"{amount(now)}{suffix}", f"{now / max(1, was) - 1:+.1%}"))
    return table(("the model's", "now", "then", "change"), rows, right=(1, 2, 3))
