"""Healing that finds its own recipe: the rate by a short trial, the length by rows that are held out.

history = guided(small, teacher, batches, Healing(passes=5))
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from shallower.calibrating.fisher import rows_are_independent
from shallower.core.batches import Batch, Batches
from shallower.core.inputs import InputsOf, model_device
from shallower.core.modes import evaluating, in_eval_mode
from shallower.core.options import Options, option
from shallower.core.processes import agreed, agreed_result
from shallower.core.tensors import hash_of_weights, told_apart
from shallower.core.trees import cut, mapped, rows_of, tensors, to_device
from shallower.errors import SiteError, TrainingError
from shallower.training.accelerating import placed, started
from shallower.training.loop import DivergedError, Score, copied_state, recipe_in, train
from shallower.training.matching import Lesson, Pupil, Teacher
from shallower.training.randomness import kept, seed, seed_order
from shallower.training.recipe import Checkpoint, History, Recipe

_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FIRST = 4
"""Of the rates, that which is tried first; then its neighbours, as long as they are better."""
TRIAL = (8, 32)
"""Steps of a trial, at least and at most."""
SHARE_OF_TRIAL = 20
"""A trial has one step for so many of the training."""
_TIMED = 3
"""Steps by which the time of one is measured."""
_HARM = 0.5
"""What a trial with the rate above the best may lose, as a part of what the best gains."""
_MEMORY = 0.95
"""Of AdamW for squared gradients: of few steps the first are not to weigh for long."""
_STEPS = 100
"""Of a pass, at least, where there are enough rows: small steps are worth more than large ones."""
_HELD_OUT = 10
"""One in so many rows is held out."""
_MOST_HELD_OUT = 512
_LEAST_ROUND, _STEPS_FOR_A_SCORE = 64, 8
"""Steps between two looks at the rows held out: a look costs less than one in eight."""


@dataclass(frozen=True)
class Healing(Options):
    """How `heal` finds its own recipe.

        sh.heal(small, model, batches, sh.Healing(passes=3))
        sh.heal(small, model, batches, sh.Healing(seconds=60))

    Attributes:
        passes: over the rows, at most; the training stops earlier where the rows held out no longer gain.
        seconds: for all of it, about; None for no limit.
        lr: the highest learning rate; None for the best of a short trial.
        rows: that are read, at most, the first ones.
        patience: looks at the rows held out without a gain after which it stops.
        batchnorm: "evaluation" keeps the statistics that BatchNorm has; "training" normalises by the batch.
        precision: "no", "bf16" or "fp16"; the latter two are autocast.
        seed: of the order of the rows.
    """

    error: ClassVar = TrainingError

    passes: int = option(8, least=1)
    seconds: float | None = option(None, above=0)
    lr: float | None = option(None, above=0)
    rows: int = option(20_000, least=2)
    patience: int = option(3, least=1)
    batchnorm: Literal["evaluation", "training"] = "evaluation"
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = option(0, least=0)


def guided(
    small: nn.Module,
    teacher: Teacher,
    batches: Iterable[Any],
    options: Healing,
    inputs_of: InputsOf,
    *,
    score: Score | None = None,
    floor: float | None = None,
    checkpoint: Checkpoint | None = None,
    cpu: bool = False,
) -> History:
    """Train `small`, in place, as long as it comes nearer to the teacher on rows that it is not trained on.

        with Teacher(model, Matching()) as teacher:
            history = guided(small, teacher, batches, Healing(), default_inputs_of)

    Args:
        small: is afterwards at least as near as before on the rows held out, or as good by `score`.
        teacher: the original.
        batches: read once, at most `options.rows` rows.
        options: see `Healing`.
        inputs_of: picks the model's inputs out of a batch.
        score: takes the place of the rows held out; higher is better.
        floor, checkpoint, cpu: see `train`.

    Raises:
        TrainingError: there are not two rows, or see `train`.
    """
    start = time.perf_counter()
    with started(options.precision, cpu) as accelerator:
        device, world = accelerator.device, accelerator.num_processes
    with placed(small, device):
        data = _read_rows(batches, options, inputs_of, teacher, device)
        lessons, held = _divided(data, teacher)
        if score is None:
            score = _nearness(teacher, held)
        healing = _Guided(small, teacher, options, score, lessons, world, cpu)
        file = None
        if checkpoint is not None and checkpoint.file.exists():
            file = checkpoint.file
        if file is not None:
            recipe, steps = recipe_in(file)
        else:
            recipe, steps = healing.recipe(len(held), start)
        identity = _identity_of(small, teacher, data.digest, options, floor)
        history = healing.train(recipe, steps, identity, floor=floor, checkpoint=checkpoint, label="healing")
        history.lr = recipe.lr
        return history


class _Guided:
    """What the trials and the training share."""

    def __init__(
        self,
        small: nn.Module,
        teacher: Teacher,
        options: Healing,
        score: Score,
        lessons: Lessons,
        world: int,
        cpu: bool,
    ) -> None:
        self.small, self.teacher, self.options = small, teacher, options
        self.score, self.lessons, self.world, self.cpu = score, lessons, world, cpu
        self.whole = max(1, len(lessons) // world)

    def recipe(self, held: int, start: float) -> tuple[Recipe, int]:
        """How to train, and the steps between two looks at the rows held out."""
        options = self.options
        total = self.whole * options.passes
        if options.seconds is not None:
            seconds = self._seconds_of_a_step()
            total = agreed(min(total, max(1, int((options.seconds - (time.perf_counter() - start)) / seconds))))
        lr = options.lr
        if lr is None:
            least, most = TRIAL
            lr = self._best_rate(min(max(total // SHARE_OF_TRIAL, least), most, self.whole))
        if options.seconds is not None:
            total = agreed(min(total, max(1, int((options.seconds - (time.perf_counter() - start)) / seconds))))
        steps = min(self.whole, total, max(_LEAST_ROUND, _STEPS_FOR_A_SCORE * held))
        return self._recipe(lr, max(1, round(total / steps)), warmup=0.05, patience=options.patience), steps

    def _seconds_of_a_step(self) -> float:
        """By a few steps, which are undone: what more of them take."""
        start, spent = copied_state(self.small), [0.0]
        for steps in (1, 1, 1 + _TIMED):
            begun = time.perf_counter()
            self._trial(_RATES[0], steps)
            spent.append(time.perf_counter() - begun)
        self.small.load_state_dict(start)
        return max(spent[-1] - spent[-2], spent[-1] / 10) / _TIMED

    def _recipe(self, lr: float, epochs: int, **more: Any) -> Recipe:
        options = self.options
        return Recipe(
            epochs, lr, weight_decay=0.0, memory=_MEMORY, precision=options.precision, seed=options.seed, **more
        )

    def _best_rate(self, steps: int) -> float:
        """The rate for a training, by so many steps with each from the same start.

        It is the one above the best of the trial, unless that one does harm: few steps favour small rates, and the
        training has many.

        Reference: Wu, Ren, Liao and Grosse, Understanding short-horizon bias in stochastic meta-optimization, 2018.
        """
        start, before = copied_state(self.small), self._scored()
        found: dict[int, float] = {}

        def result(index: int) -> float:
            if index not in found:
                found[index] = self._trial(_RATES[index], steps)
                self.small.load_state_dict(start)
            return found[index]

        best = _FIRST
        while best > 0 and (result(best) <= before or result(best - 1) > result(best)):
            best -= 1
        while best + 1 < len(_RATES) and result(best + 1) > result(best):
            best += 1
        harmless = before - _HARM * max(0.0, found[best] - before)
        chosen = best
        if best + 1 in found and found[best + 1] > harmless:
            chosen = best + 1
        return _RATES[chosen]

    def _scored(self) -> float:
        """The score of the network as it is."""
        with in_eval_mode(self.small):
            return float(agreed_result(self.score, self.small))

    def _trial(self, lr: float, steps: int) -> float:
        """The score after so many steps; minus infinity where the training diverges."""
        try:
            history = self.train(self._recipe(lr, 1, warmup=0.25), steps, label=f"healing: trying {lr:g}")
        except DivergedError:
            return -math.inf
        (value,) = history.scores
        if math.isnan(value):
            return -math.inf
        return value

    def train(self, recipe: Recipe, steps: int, identity: str = "", **more: Any) -> History:
        """Rounds of so many steps."""
        sampler = RandomSampler(self.lessons, num_samples=steps * self.world, generator=torch.Generator())
        loader = DataLoader(self.lessons, batch_size=None, sampler=sampler, collate_fn=_as_it_comes)
        pupil = Pupil(self.small, self.options.batchnorm == "training", identity)
        return train(self.small, loader, self._loss, recipe, method=pupil, score=self.score, cpu=self.cpu, **more)

    def _loss(self, student: nn.Module, lesson: Lesson) -> Tensor:
        return self.teacher.distance(student, lesson, self.small)


class Lessons(Dataset[Lesson]):
    """Parts of batches.

    Args:
        data: the batches.
        parts: of each part the batch's index and the rows, None for all of it.
        first: the number of the first lesson.
    """

    def __init__(self, data: Batches, parts: Sequence[tuple[int, slice | None]], first: int = 0) -> None:
        self._data, self._parts, self._first = data, parts, first

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Lesson:
        """The lesson with that index."""
        if not 0 <= index < len(self._parts):
            raise IndexError(index)
        number, rows = self._parts[index]
        batch = self._data[number]
        if rows is not None:
            batch = _without_padding(cut(batch, rows))
        return Lesson(batch, self._first + index)


def _without_padding(batch: Batch) -> Batch:
    """The batch without the last positions if they are padding in every row: a part may be shorter than the whole."""
    inputs, mask = batch.inputs, batch.mask
    if mask is None or not isinstance(inputs, Mapping) or inputs.get("attention_mask") is None or batch.own_mask:
        return batch
    if any(tensor.shape != mask.shape for tensor in tensors(inputs)):
        return batch
    if not bool(mask.any()) or bool(mask[:, -1].any()):
        return batch
    length = int(mask.bool().any(0).nonzero().max()) + 1
    shorter: Batch = mapped(lambda tensor: tensor[:, :length], batch)
    return shorter


def _read_rows(
    batches: Iterable[Any], options: Healing, inputs_of: InputsOf, teacher: Teacher, device: torch.device
) -> Batches:
    """The batches, in the same order in every process and every call, whatever order a loader draws."""
    with kept(device, batches):
        seed(options.seed, device)
        seed_order(batches, options.seed, 0)
        try:
            return Batches.read(batches, inputs_of, teacher.matching.mask_of, rows=options.rows)
        except SiteError as error:
            raise TrainingError(str(error)) from error


def _divided(data: Batches, teacher: Teacher) -> tuple[Lessons, Lessons]:
    """What is trained on, in small parts, and what is held out.

    Raises:
        TrainingError: there are not two parts.
    """
    if not len(data):
        raise TrainingError("there are no batches to train on")
    most, original = data.rows, teacher.model
    if rows_are_independent(original, data[0].on(model_device(original)).inputs, teacher.matching.output_of):
        most = -(-data.rows // _STEPS)
    parts: list[tuple[int, slice | None]] = []
    for index in range(len(data)):
        rows = rows_of(data[index].inputs)
        if rows is None or rows <= most:
            parts.append((index, None))
            continue
        for begin in range(0, rows, most):
            parts.append((index, slice(begin, min(begin + most, rows))))
    if len(parts) < 2:
        raise TrainingError("healing holds rows out, to stop in time: give two batches or more")
    count = max(1, min(len(parts) // _HELD_OUT, _MOST_HELD_OUT * len(parts) // data.rows))
    step = len(parts) / count
    held = {int((number + 0.5) * step) for number in range(count)}
    trained = [part for index, part in enumerate(parts) if index not in held]
    return Lessons(data, trained), Lessons(data, [parts[index] for index in sorted(held)], len(trained))


def _nearness(teacher: Teacher, held: Lessons) -> Score:
    """Minus the mean distance over the rows held out."""

    def score(model: nn.Module) -> float:
        total, rows = 0.0, 0
        with evaluating(model):
            for index in range(len(held)):
                lesson = to_device(held[index], model_device(model))
                total += lesson.batch.rows * float(teacher.distance(model, lesson))
                rows += lesson.batch.rows
        return -total / rows

    return score


def _identity_of(small: nn.Module, teacher: Teacher, data: str, options: Healing, floor: float | None) -> str:
    """What the result depends on, hashed."""
    matching = teacher.matching
    compared = matching.match, matching.temperature, matching.logits, matching.names
    functions = told_apart([matching.output_of, matching.mask_of])
    parts = hash_of_weights(small), hash_of_weights(teacher.model), data, options, compared, functions, floor
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _as_it_comes(lesson: Any) -> Any:
    return lesson
