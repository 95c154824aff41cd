"""One run of `shallower compress`: from the names of a model and of data to a directory with the result."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from shallower.batching import make_batches
from shallower.budget import Target
from shallower.checkpoint import check_replaceable, read_source, save
from shallower.compression import Result, Settings, compress, verdict_table
from shallower.data import Rows, read_rows
from shallower.errors import CheckpointError, ModelError, ShallowerError, TargetError
from shallower.models import DESCRIPTION, LoadedModel, load_model
from shallower.tasks import TASK_NAMES, Task, TaskName, task_named
from shallower.training import Recipe

SCHEMA = 1
"""Version of result.json."""

RESULT = "result.json"

_ENDINGS: Mapping[str, TaskName] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}


@dataclass(frozen=True)
class Job:
    """Everything that `shallower compress` is told; its help says what each option means."""

    model: str
    data: str
    target: Target
    output: Path
    task: TaskName | None = None
    method: Literal["layer-collapse"] = "layer-collapse"
    eval_data: str = ""
    text_column: str = ""
    label_column: str = ""
    image_column: str = ""
    limit: int | None = None
    held_out: float = 0.1
    length: int | None = None
    image_size: int | None = None
    epochs: int = 3
    dense_epochs: int = 0
    lr: float = 1e-4
    batch_size: int = 32
    strength: float = 0.5
    tolerance: float = 0.05
    order: Literal["sensitivity", "last-first"] = "sensitivity"
    stages: int = 1
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
        return {**asdict(self), "target": str(self.target), "output": str(self.output)}

    @cached_property
    def fingerprint(self) -> str:
        """Of all options but the output: a run goes on only as the same run."""
        options = {name: value for name, value in self.options.items() if name != "output"}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def run(job: Job, *, resume: bool = True) -> str:
    """Do a job, and tell what came of it. The directory of the result appears at the end, whole.

    Args:
        job: what to do.
        resume: go on from an interrupted run of the same job.

    Raises:
        ShallowerError: the first thing that is wrong, before anything is written.
    """
    check_replaceable(job.output.expanduser().resolve())
    name = job.task or task_of(job.model)
    task = task_named(name)
    settings = Settings(
        target=job.target,
        recipe=Recipe(job.epochs, job.lr, warmup=0.1, precision=job.precision, seed=job.seed),
        strength=job.strength,
        tolerance=job.tolerance,
        order=job.order,
        stages=job.stages,
        dense_epochs=job.dense_epochs,
        floor=None if job.quality_floor is None else task.score_of(job.quality_floor),
        sites=job.sites,
    )
    device = _device(job.device)
    with _checkpoints(job, resume) as checkpoints:
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
        )
        torch.manual_seed(job.seed)
        loaded, new_head = _load(job.model, name, rows)
        dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)
        loaded.model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        batches = make_batches(
            rows,
            name,
            loaded.model,
            loaded.processor,
            batch_size=job.batch_size,
            length=job.length,
            image_size=job.image_size,
            seed=job.seed,
        )
        result = compress(loaded.model, batches, task, settings, checkpoints=checkpoints, cpu=device.type == "cpu")
        result.model.to("cpu", dtype)
        _write(job, loaded, rows, task, result)
    again = "" if loaded.source else ", model=a fresh instance of the original model"
    lines = [
        verdict_table(task.quality, result.verdict.rows(task, "dense", f"{len(result.collapsed)} collapsed")),
        f"collapsed: {', '.join(result.collapsed)}",
        f"saved in {job.output}; read it with shallower.load({str(job.output)!r}{again})",
    ]
    if new_head and not job.dense_epochs:
        lines.append(
            "the head was new, so the dense score says little; --dense-epochs trains the model as it is, first"
        )
    return "\n".join(lines)


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
    architectures = [rest.partition("?")[0]] if library == "transformers" else []
    if not architectures and (path / "config.json").is_file():
        try:
            architectures = json.loads((path / "config.json").read_text()).get("architectures") or []
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{path / 'config.json'}: cannot be read: {error}") from error
    for architecture in architectures:
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                return task
    raise ModelError(f"{model} does not say what it was made for: choose --task {', '.join(TASK_NAMES)}")


def _load(spec: str, task: TaskName, rows: Rows) -> tuple[LoadedModel, bool]:
    """The model with a head for the task, and whether that is new: it then has as many outputs as the data classes."""
    loaded = load_model(spec, task=task)
    config = getattr(loaded.model, "config", None)
    made_for = getattr(config, "architectures", None) or ()
    saved = (Path(spec).expanduser() / DESCRIPTION).is_file()
    new_head = config is not None and not saved and type(loaded.model).__name__ not in made_for
    if not new_head or rows.labels is None:
        return loaded, new_head
    loaded = load_model(spec, task=task, num_labels=rows.labels.count)
    if rows.labels.names:
        named: Any = loaded.model.config
        named.id2label = dict(enumerate(rows.labels.names))
        named.label2id = {name: number for number, name in enumerate(rows.labels.names)}
    return loaded, True


def _device(name: str) -> torch.device:
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

    processor: Any | None
    result: Result
    numbers: dict[str, Any]

    def save_pretrained(self, directory: Path) -> None:
        """Write the tokenizer or image processor, the plan and the numbers."""
        if self.processor is not None:
            self.processor.save_pretrained(directory)
        self.result.plan.save(directory)
        (directory / RESULT).write_text(json.dumps(self.numbers, indent=2) + "\n")


def _write(job: Job, loaded: LoadedModel, rows: Rows, task: Task, result: Result) -> None:
    numbers = {
        "schema": SCHEMA,
        "options": job.options,
        "quality": task.quality,
        **result.verdict.to_json(),
        "collapsed": list(result.collapsed),
        "stages": [asdict(stage) for stage in result.stages],
        "classes": list(rows.labels.names) if rows.labels is not None else None,
        "rows": {
            "train": len(rows.train),
            "validation": len(rows.validation),
            "test": None if rows.test is None else len(rows.test),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "shallower": version("shallower"),
        },
    }
    save(result.model, job.output, loaded.source, _Companions(loaded.processor, result, numbers))
