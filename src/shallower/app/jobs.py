"""One run of `shallower compress`: from the names of a model and of data to a directory with the result."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shallower.app.batching import Batches, make_batches
from shallower.app.compression import MethodRun, Result, Settings, compress, preview, site_table, verdict_table
from shallower.app.data import Rows, read_rows
from shallower.app.models import LoadedModel, load_model
from shallower.app.report.card import write_card
from shallower.app.report.page import write_report
from shallower.app.results import CURVE, RESULT, SCHEMA
from shallower.app.tasks import TASK_NAMES, Task, TaskName, task_named
from shallower.core.inputs import Inputs, model_device, tensors
from shallower.core.text import amount, table
from shallower.errors import CheckpointError, DataError, ModelError, ShallowerError, TargetError
from shallower.planning.plan import Plan
from shallower.planning.targets import Cost, Target
from shallower.saving.checkpoint import read_source, save
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


@dataclass(frozen=True)
class Job:
    """Everything that `shallower compress` is told; its help says what each option means.

    Attributes:
        run: the method with its own options.
        lr: None: what the method takes for its training.
    """

    model: str
    data: str
    target: Target | None
    output: Path
    run: MethodRun
    task: TaskName | None = None
    eval_data: str = ""
    text_column: str = ""
    label_column: str = ""
    image_column: str = ""
    limit: int | None = None
    held_out: float = 0.1
    length: int | None = None
    image_size: int | None = None
    augment: bool = False
    epochs: int = 3
    dense_epochs: int = 0
    lr: float = 1e-4
    batch_size: int = 32
    sites: str = "*"
    quality_floor: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    @property
    def progress(self) -> Path:
        """Where the state of an unfinished run is kept, beside the output."""
        output = self.output.expanduser().resolve()
        return output.with_name(f".{output.name}.progress")

    @cached_property
    def options(self) -> dict[str, Any]:
        """All of it as plain data."""
        own = {name: value for name, value in asdict(self).items() if name != "run"}
        method = {"method": self.run.name, **asdict(self.run)}  # type: ignore[call-overload]
        return {**own, **method, "target": str(self.target or ""), "output": str(self.output)}

    @cached_property
    def fingerprint(self) -> str:
        """Of all options but the output: a run goes on only as the same run."""
        options = {name: value for name, value in self.options.items() if name != "output"}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Told:
    """What a command tells: as text for people, as plain data for JSON."""

    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class _Ready:
    """A model and its data, loaded."""

    loaded: LoadedModel
    rows: Rows
    batches: Batches
    task: Task
    settings: Settings
    dtype: torch.dtype
    cpu: bool
    remarks: tuple[str, ...]


def run(job: Job, *, resume: bool = True) -> Told:
    """Do a job, and tell what came of it. The directory of the result appears at the end, whole.

    Args:
        job: what to do.
        resume: go on from an interrupted run of the same job.

    Raises:
        ShallowerError: the first thing that is wrong, before anything is written.
    """
    started = time.perf_counter()
    check_replaceable(job.output.expanduser().resolve())
    name = job.task or task_of(job.model)
    device = device_named(job.device)
    with _checkpoints(job, resume) as checkpoints:
        ready = _load(job, name, device)
        result = compress(
            ready.loaded.model, ready.batches, ready.task, ready.settings, checkpoints=checkpoints, cpu=ready.cpu
        )
        rows, made = ready.rows, result.made
        numbers = numbers_of(
            result,
            job.options,
            {name: None if part is None else len(part) for name, part in rows.parts.items()},
            ready.batches.example,
            seconds=time.perf_counter() - started,
            classes=None if rows.labels is None else rows.labels.names,
            warnings=ready.remarks,
        )
        made.model.to("cpu", ready.dtype)
        write(made.model, job.output, ready.loaded, made.plan, numbers, points=made.points, files=made.files)
    return Told(_told(job, ready, result), {**numbers, "output": str(job.output)})


def dry_run(job: Job) -> Told:
    """Tell what a job would do and save; nothing is written.

    Raises:
        ShallowerError: the first thing that is wrong.
    """
    check_replaceable(job.output.expanduser().resolve())
    ready = _load(job, job.task or task_of(job.model), device_named(job.device))
    plan, before, after = preview(ready.loaded.model, ready.batches, ready.task, ready.settings, cpu=ready.cpu)
    data = {
        "dry_run": True,
        "options": job.options,
        "before": asdict(before),
        "after": asdict(after),
        "sites": {site.pop("name"): site for site in site_table(plan)},
        "warnings": list(ready.remarks),
    }
    lines = [str(plan), _savings(before, after), *ready.remarks, f"dry run: nothing was written to {job.output}"]
    return Told("\n".join(lines), data)


def write(
    model: nn.Module,
    output: Path,
    loaded: LoadedModel,
    plan: Plan,
    numbers: Mapping[str, Any],
    *,
    points: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the directory of a result: weights, tokenizer, plan, numbers, curve, report and model card.

    Args:
        model: the result.
        output: the directory; it appears whole or not at all.
        loaded: the model it was made of.
        plan: how it was made.
        numbers: result.json.
        points: of the curve, where there is one.
        files: more tensors, by the name of the file.
    """
    save(model, output, loaded.source, _Companions(output, loaded.processor, plan, numbers, points, files or {}))


def task_of(model: str) -> TaskName:
    """What a model was made for, as far as its name or its config.json says.

    Raises:
        ModelError: neither does.
    """
    path = Path(model).expanduser()
    source = read_source(path) if (path / DESCRIPTION).is_file() else model
    library, _, rest = source.partition(":")
    if library in ("timm", "torchvision"):
        return "image-classification"
    config: Mapping[str, Any] = {}
    if (path / "config.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text())
            config.get("architectures")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{path / 'config.json'}: cannot be read: {error}") from error
    architectures = [rest.partition("?")[0]] if library == "transformers" else config.get("architectures") or []
    for architecture in architectures:
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                pictures = task == "feature-extraction" and "image_size" in config
                return "image-feature-extraction" if pictures else task
    raise ModelError(f"{model} does not say what it was made for: choose --task {', '.join(TASK_NAMES)}")


def _check_options(job: Job, task: TaskName) -> None:
    """Refuse options that mean nothing for the task, before anything is read."""
    pictures, classes = "image" in task, task.endswith("classification")
    for option, given, means in (
        ("--text-column", job.text_column, not pictures),
        ("--length", job.length, not pictures),
        ("--image-column", job.image_column, pictures),
        ("--image-size", job.image_size, pictures),
        ("--augment", job.augment, pictures),
        ("--label-column", job.label_column, classes),
    ):
        if given and not means:
            raise DataError(f"{option} means nothing for {task}: leave it out, or say another --task")


def _load(job: Job, name: TaskName, device: torch.device) -> _Ready:
    _check_options(job, name)
    needed = job.run.needs_labels or job.dense_epochs > 0
    rows = read_rows(
        job.data,
        name,
        eval_source=job.eval_data,
        text_column=job.text_column,
        label_column=job.label_column,
        image_column=job.image_column,
        held_out=job.held_out,
        limit=job.limit,
        seed=job.seed,
        need_labels=needed,
    )
    torch.manual_seed(job.seed)
    loaded, new_head = _model(job.model, name, rows)
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)
    loaded.model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

    def batches_of(rows: Rows) -> Batches:
        return make_batches(
            rows,
            name,
            loaded.model,
            loaded.processor,
            batch_size=job.batch_size,
            length=job.length,
            image_size=job.image_size,
            augment=job.augment,
            seed=job.seed,
        )

    remarks = []
    try:
        batches = batches_of(rows)
    except DataError as error:
        if needed or job.label_column or rows.labels is None:
            raise
        rows = replace(rows, columns=replace(rows.columns, label=""), labels=None)
        batches = batches_of(rows)
        remarks.append(f"the labels were not used: {error}")
    task = task_named(name, labelled=rows.labels is not None)
    if rows.labels is None and name != "causal-lm":
        remarks.append(f"without labels, quality is the {task.quality} of the answers with the original's")
    if new_head and not job.dense_epochs and rows.labels is not None:
        remarks.append(
            "the head was new, so the dense score says little; --dense-epochs trains the model as it is, first"
        )
    settings = Settings(
        job.target,
        job.run,
        Recipe(job.epochs, job.lr, warmup=0.1, precision=job.precision, seed=job.seed),
        job.dense_epochs,
        None if job.quality_floor is None else task.score_of(job.quality_floor),
        job.sites,
    )
    return _Ready(loaded, rows, batches, task, settings, dtype, device.type == "cpu", tuple(remarks))


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


def device_named(name: str) -> torch.device:
    """What --device means here.

    Raises:
        ShallowerError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ShallowerError("--device cuda: there is no CUDA device here; choose cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _checkpoints(job: Job, resume: bool) -> Iterator[Path]:
    """The folder for the state of this run. It stays where the run was interrupted, so that it can go on."""
    folder = job.progress
    note = folder / "job.json"
    try:
        if not resume and folder.exists():
            shutil.rmtree(folder)
        if note.exists() and json.loads(note.read_text()).get("fingerprint") != job.fingerprint:
            raise CheckpointError(
                f"{folder} is of an interrupted run with other options: repeat that command, or add --fresh"
            )
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"fingerprint": job.fingerprint, "options": job.options}, indent=2) + "\n")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    try:
        yield folder
    except ShallowerError as error:
        # What was trained towards a target out of reach is of no use; before other errors it may have taken long.
        if isinstance(error, TargetError) or list(folder.iterdir()) == [note]:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Companions:
    """What lies beside the weights, written by `save` together with them."""

    output: Path
    processor: Any | None
    plan: Plan
    numbers: Mapping[str, Any]
    points: Sequence[Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Tensor]]

    def save_pretrained(self, directory: Path) -> None:
        """Write the tokenizer or image processor, the plan, the numbers, the curve, the report and the card."""
        if self.processor is not None:
            self.processor.save_pretrained(directory)
        self.plan.save(directory)
        (directory / RESULT).write_text(json.dumps(self.numbers, indent=2) + "\n")
        if self.points:
            curve = {"schema": 1, "name": self.numbers["quality"], "points": list(self.points)}
            (directory / CURVE).write_text(json.dumps(curve, indent=2) + "\n")
        for name, values in self.files.items():
            save_file(dict(values), directory / name)
        write_report(directory, at=self.output)
        write_card(directory, at=self.output)


def numbers_of(
    result: Result,
    options: Mapping[str, Any],
    rows: Mapping[str, int | None],
    example: Inputs,
    *,
    seconds: float,
    classes: Sequence[str] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """What result.json says of a run: plain data.

    Args:
        result: of the run.
        options: what it was told.
        rows: how many there are of each part; None for a test part that is not there.
        example: the inputs on which costs and latencies were taken.
        seconds: that it took.
        classes: of the data.
        warnings: what people should know of it.
    """
    shape = next((tensor.shape for tensor in tensors(example)), ())
    device = model_device(result.model)
    return {
        "schema": SCHEMA,
        "options": dict(options),
        "quality": result.task.quality,
        **result.verdict.to_json(),
        "sites": {site.pop("name"): site for site in site_table(result.made.plan)},
        **result.made.details,
        "warnings": list(warnings),
        "classes": None if classes is None else list(classes),
        "rows": dict(rows),
        "example": " x ".join(map(str, shape)),
        "seconds": seconds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "shallower": version("shallower"),
        },
    }


def _told(job: Job, ready: _Ready, result: Result) -> str:
    output = str(job.output)
    again = "" if ready.loaded.source else ", model=a fresh instance of the original model"
    lines = [
        str(result.made.plan),
        "",
        verdict_table(result.task.quality, result.verdict.rows(result.task, "dense", result.made.note)),
        *ready.remarks,
        f"saved in {output}; read it with shallower.load({output!r}{again})",
    ]
    return "\n".join(lines)


def _savings(before: Cost, after: Cost) -> str:
    rows = [
        (unit, f"{amount(was)}{suffix}", f"{amount(now)}{suffix}", f"{now / max(1, was) - 1:+.1%}")
        for unit, was, now, suffix in (
            ("params", before.params, after.params, ""),
            ("MACs", before.macs, after.macs, ""),
            ("memory", before.memory, after.memory, "B"),
        )
    ]
    return table(("the model's", "now", "then", "change"), rows, right=(1, 2, 3))
