"""How to train, where a run is kept, and what it reports: plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from shallower.core.options import Options, option
from shallower.errors import TrainingError

_MOST_SEED = 2**32 - 1
"""NumPy accepts no larger seed."""


@dataclass(frozen=True)
class Recipe(Options):
    """How to train.

        recipe = sh.Recipe(epochs=3, lr=5e-5, warmup=0.1)
        sh.train(model, loader, lambda model, batch: model(**batch).loss, recipe)

    Attributes:
        epochs: passes over the batches.
        lr: highest learning rate.
        optimizer: "adamw" or "sgd".
        weight_decay: on weights of two dimensions or more; a method decides for what it added.
        momentum: of SGD.
        memory: of AdamW for squared gradients (beta 2).
        schedule: after the warm-up, "cosine" to zero, "step" (times `gamma` at each of `milestones`) or "constant".
        warmup: fraction of all steps over which the learning rate rises linearly from zero.
        milestones: fractions of all steps, for "step".
        gamma: for "step".
        clip: largest norm of the gradient; None does not clip.
        patience: passes without a better score after which the training stops; afterwards the model is in its best
            state, that before the training included. None trains to the end and keeps that. Needs `score`.
        precision: "no", "bf16" or "fp16"; the latter two are autocast around the model's forward pass.
        seed: of the order of the batches, dropout and augmentation (torch, NumPy and Python).

    Raises:
        TrainingError: a value is out of its range; the error names it.
    """

    error: ClassVar = TrainingError

    epochs: int = option(least=0)
    lr: float = option(above=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = option(0.01, least=0)
    momentum: float = option(0.9, least=0, below=1)
    memory: float = option(0.999, least=0, below=1)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = option(0.0, least=0, below=1)
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = option(0.1, above=0)
    clip: float | None = option(1.0, above=0)
    patience: int | None = option(None, least=1)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = option(0, least=0, most=_MOST_SEED)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        super().__post_init__()
        for milestone in self.milestones:
            if not 0 <= milestone < 1:
                raise TrainingError(f"milestones={self.milestones!r}: fractions of all steps, from 0 to below 1")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0) of `steps`."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return float(self.gamma ** sum(step >= milestone * steps for milestone in self.milestones))
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass
class History:
    """The course of a training run, one value an epoch.

        history = sh.train(model, loader, loss, recipe)
        history.losses[-1]

    Attributes:
        losses: mean loss, penalties of the method included, on the main process.
        scores: what `score` returned after the epoch; empty without it.
        seconds: wall time, scoring and checkpoints included.
        stopped: the score fell below the floor, or rose no longer; the model is in the last state that did not, or the
            best one.
        resumed: steps that were read from the checkpoint, not trained in this call.
        before: the score before the training, where a patience asked for it.
        lr: the highest learning rate, where a trial found it.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: bool = False
    resumed: int = 0
    before: float | None = None
    lr: float | None = None

    @property
    def best(self) -> float | None:
        """The best score, that before the training included; None where nothing was scored."""
        scores = [score for score in self.scores if not math.isnan(score)]
        if self.before is not None:
            scores.append(self.before)
        return max(scores, default=None)


@dataclass(frozen=True)
class Checkpoint(Options):
    """Where the state of a run is kept, so that the same call continues after an interruption.

        sh.train(model, loader, loss, recipe, checkpoint=sh.Checkpoint("run.safetensors", every=200))

    Attributes:
        path: a file (.safetensors) for one training; a folder where a method trains in rounds.
        every: steps after which the state is also written, besides the end of every epoch; 0 for none.
    """

    error: ClassVar = TrainingError

    path: Path | str
    every: int = option(0, least=0)

    @classmethod
    def of(cls, checkpoint: Checkpoint | Path | str | None) -> Checkpoint | None:
        """A path alone means: after every epoch."""
        if checkpoint is None or isinstance(checkpoint, Checkpoint):
            return checkpoint
        return cls(checkpoint)

    @property
    def file(self) -> Path:
        """The path as one."""
        return Path(self.path)

    def inside(self, name: str) -> Checkpoint:
        """A file in this folder, written as often."""
        return Checkpoint(self.file / name, self.every)
