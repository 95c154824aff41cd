"""`sh.compress`: what the command line does, for a model and batches that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shallower.app.batching import EXAMPLE, TaskBatches, loader
from shallower.app.compression import Result, Work, run_method
from shallower.app.deciding.clock import Clock
from shallower.app.failures import on_stderr
from shallower.app.jobs import checkpoints_beside, record_of, write_result
from shallower.app.models import LoadedModel
from shallower.app.options import MINUTES
from shallower.app.quality import shown
from shallower.app.runs.auto import AutoRun
from shallower.app.tasks import (
    IGNORED,
    Classification,
    LanguageModelling,
    Likeness,
    Task,
    first_output,
    labels_of,
    logits_of,
)
from shallower.core.inputs import Inputs, default_inputs_of, model_device, reiterable
from shallower.core.modes import evaluating
from shallower.core.outputs import are_logits
from shallower.core.tensors import hash_of_weights
from shallower.core.trees import cut, rows_of
from shallower.errors import DataError, MethodError, ModelError
from shallower.modules.attachment import detached_copy
from shallower.planning.targets import Target
from shallower.saving.sources import source_of
from shallower.saving.writing import check_replaceable
from shallower.training.loop import Score

_ONE_IN = 10
"""One in so many batches is held out to choose on, and one to report on."""
_MOST_BATCHES = 20_000
"""That are read, at most."""


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    target: str | Target,
    *,
    minutes: float = MINUTES,
    score: Score | None = None,
    sites: str = "*",
    output: str | Path | None = None,
    sizes: int = 0,
    tell: Callable[[str], object] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A smaller model that meets the target, as good as the minutes allow.

        small = sh.compress(model, batches, target="latency:1.5x", minutes=5)
        sh.save(small, "small/")

    It squeezes on some of the rows, heals with what is left of the minutes, and, where batches have labels and time is
    left even then, tries whether layers that collapse by training are better. One batch in ten is held out to choose
    on and one to report on. The end is a paragraph: what was done, what it cost, and what more time would bring.

    Args:
        model: trained; it is not changed.
        batches: what the model takes, or (inputs, labels), or mappings with `labels`; a list, a DataLoader or a data
            set. Labels are not needed: without them the result is judged by how it agrees with the model.
        target: of parameters, MACs, bytes, KV cache, latency or loss of score; see `Target`.
        minutes: for all of it.
        score: quality of a model, higher is better, in the place of what is found in the batches.
        sites: glob on the names of the sites that may change.
        output: a folder for the result, as the command line writes it, with report and model card; an interrupted run
            that is called again goes on from what is kept beside it. Without one nothing is written.
        sizes: how many smaller sizes to make besides, for `pick` to choose from; they need an `output`, and time.
        tell: is called with the estimates at first, what is being done, and the paragraph; by default they are printed
            on stderr.
        seed: of the rows that are drawn, and of training.

    Returns:
        The model, in eval mode, on the device that `model` is on.

    Raises:
        TargetError: the target cannot be met.
        SiteError: nothing can be squeezed.
        DataError, FitError: the batches are too few, or are not what the model takes.
        MethodError: the minutes are too few.
        CheckpointError: the folder holds other things.
    """
    if not minutes > 0:
        raise MethodError(f"minutes={minutes}: give more than 0")
    clock = Clock.begun(minutes)
    speak = tell or on_stderr
    target = Target.parse(target)
    folder = None
    if output is not None:
        folder = Path(output).expanduser()
        check_replaceable(folder.resolve())
    device = model_device(model)
    dense = detached_copy(model).eval()
    parts, task = _divided_up(dense, batches, seed)
    if score is not None:
        task = Scored(score, task)
    work = Work(dense, parts, task, target, sites=sites, cpu=device.type == "cpu", clock=clock, tell=speak)
    work = replace(work, recipe=replace(work.recipe, seed=seed))
    if folder is None:
        return _told(run_method(work, AutoRun(sizes=sizes)), speak).to(device)
    options = asdict(AutoRun(sizes=sizes)) | {"model": source_of(dense), "method": AutoRun.name, "target": str(target)}
    options |= {"sites": sites, "minutes": minutes, "seed": seed}
    with checkpoints_beside(folder, {**options, "weights": hash_of_weights(dense)}) as checkpoints:
        result = run_method(replace(work, checkpoints=checkpoints), AutoRun(sizes=sizes))
        small = _told(result, speak).to("cpu")
        record = record_of(result, options, seconds=clock.spent, warnings=result.remarks)
        loaded = LoadedModel(dense, str(options["model"]))
        write_result(result, folder, loaded, record)
    return small.to(device)


def _told(result: Result, speak: Callable[[str], object]) -> nn.Module:
    """The smaller model, when everything was said of it."""
    for alarm in result.alarms:
        speak(f"warning: {alarm}")
    speak(result.summary)
    return result.model


class Scored:
    """A task whose score is a user's own function of a model.

    Args:
        of: that function, higher is better.
        task: has the loss.
    """

    quality = "score"

    def __init__(self, of: Score, task: Task) -> None:
        self._of, self._task = of, task
        self.labelled, self.features = task.labelled, task.features

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's."""
        return self._task.loss(model, batch)

    def score(self, model: nn.Module, batches: Iterable[Any], *, label: str = "") -> float:  # noqa: ARG002
        """What the function says."""
        with evaluating(model):
            return float(self._of(model))

    def show(self, score: float) -> str:
        """0.9340."""
        return shown(self.quality, score)

    def score_of(self, quality: float) -> float:
        """The same number."""
        return quality

    def chance(self, original: nn.Module, batches: Iterable[Any]) -> float:  # noqa: ARG002
        """Unknown."""
        return 0.0


def _divided_up(model: nn.Module, batches: Iterable[Any], seed: int) -> tuple[TaskBatches, Task]:
    """The batches in three parts, and what their answers are judged by.

    Raises:
        DataError: there are not two rows.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise DataError(f"`batches` is a single {type(batches).__name__}, not a list of batches: pass [batch]")
    found: list[Any] = []
    for batch in reiterable(batches):
        found.append(batch)
        if len(found) == _MOST_BATCHES:
            break
    if len(found) < 3 * _ONE_IN:
        found = list(_halved(found))
    if len(found) < 2:
        raise DataError("there is one row, or none: give a few hundred, some to calibrate and others to judge on")
    example = _example(found[0])
    output = first_output(model, example)
    for index, batch in enumerate(found):
        found[index] = _with_next_tokens(batch, output)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, len(order) // _ONE_IN)
    chosen, reported = order[:count], order[count : 2 * count]
    if len(order) < 3:
        reported = []

    def part(numbers: list[int], seed: int | None = None) -> DataLoader[Any]:
        return loader(list(map(found.__getitem__, sorted(numbers))), _itself, None, seed)

    validation = test = part(chosen)
    if reported:
        test = part(reported)
    train = part(order[len(chosen) + len(reported) :], seed)
    return TaskBatches(train, validation, test, example, seed), _task_for(found[0], output)


def _halved(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches cut into pieces, so that there are enough to hold some out; those that cannot be cut stay whole."""
    given = list(batches)
    pieces = -(-3 * _ONE_IN // max(1, len(given)))
    for batch in given:
        rows = rows_of(batch)
        if rows is None or rows < 2:
            yield batch
            continue
        size = -(-rows // pieces)
        for start in range(0, rows, size):
            yield cut(batch, slice(start, start + size))


def _example(batch: Any) -> Inputs:
    inputs = default_inputs_of(batch)
    if rows_of(inputs) is None:
        return inputs
    few: Inputs = cut(inputs, slice(0, EXAMPLE))
    return few


def _task_for(batch: Any, output: Any) -> Task:
    """What the model's answers to such batches are judged by: labels that fit them, else the original's answers."""
    labels: Any = None
    with suppress(DataError):
        labels = labels_of(batch)
    try:
        logits = logits_of(output)
    except ModelError:
        return Likeness(features=True)
    whole = labels is not None and not labels.is_floating_point()
    if whole and logits.dim() == 2 and labels.dim() == 1 and int(labels.max()) < logits.shape[1]:
        return Classification()
    if whole and logits.dim() == 3 and labels.shape == logits.shape[:2]:
        return LanguageModelling()
    return Likeness(features=not are_logits(output) or logits.dim() != 2)


def _with_next_tokens(batch: Any, output: Any) -> Any:
    """A batch of a language model with the tokens themselves for labels, where it has none."""
    if not isinstance(batch, Mapping) or "labels" in batch or "input_ids" not in batch:
        return batch
    if not are_logits(output) or logits_of(output).dim() != 3:
        return batch
    tokens: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens))
    return {**batch, "labels": tokens.masked_fill(mask == 0, IGNORED)}


def _itself(batch: Any) -> Any:
    return batch
