"""How to train, where a run is kept, and what it reports: plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from shallower.errors import TrainingError

Optimizer = Literal["adamw", "sgd"]
Decay = Literal["cosine", "step", "constant"]
Precision = Literal["no", "bf16", "fp16"]

_MOST_SEED = 2**32
"""NumPy accepts no larger seed."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

        recipe = sh.Recipe(epochs=3, lr=5e-5, warmup=0.1)
        sh.train(model, loader, lambda model, batch: model(**batch).loss, recipe)

    Attributes:
        epochs: passes over the batches.
        lr: highest learning rate.
        optimizer: "adamw" or "sgd".
        weight_decay: on weights of two dimensions or more; a method decides for what it added.
        momentum: of SGD.
        schedule: after the warm-up, "cosine" to zero, "step" (times `gamma` at each of `milestones`) or "constant".
        warmup: fraction of all steps over which the learning rate rises linearly from zero.
        milestones: fractions of all steps, for "step".
        gamma: for "step".
        clip: largest norm of the gradient; None does not clip.
        precision: "no", "bf16" or "fp16"; the latter two are autocast around the model's forward pass.
        seed: of the order of the batches, dropout and augmentation (torch, NumPy and Python).

    Raises:
        TrainingError: a value is out of its range; the error names it.
    """

    epochs: int
    lr: float
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: Decay = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    clip: float | None = 1.0
    precision: Precision = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name, choices in (("optimizer", Optimizer), ("schedule", Decay), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise TrainingError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}")
        for name, most in (("epochs", math.inf), ("seed", _MOST_SEED - 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise TrainingError(f"{name}={value!r}: pass a whole number from 0{_up_to(most)}")
        _in_range("lr", self.lr, above=0)
        _in_range("weight_decay", self.weight_decay, least=0)
        _in_range("momentum", self.momentum, least=0, below=1)
        _in_range("warmup", self.warmup, least=0, below=1)
        _in_range("gamma", self.gamma, above=0)
        if self.clip is not None:
            _in_range("clip", self.clip, above=0)
        for milestone in self.milestones:
            _in_range("milestones", milestone, least=0, below=1)

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
    """What a training run saw, one value an epoch.

    Attributes:
        losses: mean loss, penalties of the method included, on the main process.
        scores: what `score` returned after the epoch; empty without it.
        seconds: wall time, scoring and checkpoints included.
        stopped: the score fell below the floor; the model is the last one that did not.
        resumed: steps that were read from the checkpoint, not trained in this call.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: bool = False
    resumed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a run is kept, so that the same call continues after an interruption.

        sh.train(model, loader, loss, recipe, checkpoint=sh.Checkpoint("run.safetensors", every=200))

    Attributes:
        path: a file (.safetensors) for one training; a folder where a method trains in rounds.
        every: steps after which the state is also written, besides the end of every epoch; 0 for none.
    """

    path: Path | str
    every: int = 0

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


def _in_range(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse what is no finite number in [least, below) and above `above`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and least <= value < below and value > above:
        return
    bounds = [
        f"{text} {bound:g}"
        for text, bound in (("at least", least), ("above", above), ("below", below))
        if math.isfinite(bound)
    ]
    raise TrainingError(f"{name}={value!r} is out of range: pass a number {' and '.join(bounds)}")


def _up_to(most: float) -> str:
    return f" to {most}" if math.isfinite(most) else ""
