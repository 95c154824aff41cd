"""The built-in training loop: plain supervised training, with or without a method attached, on Accelerate.

    recipe = Recipe(epochs=3, lr=5e-5, warmup=0.1)
    history = train(model, loader, lambda model, batch: model(**batch).loss, recipe, method=method, checkpoint=path)

The same call runs on one CPU, on one GPU, and in several processes under `accelerate launch` or
`python -m torch.distributed.run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.core.inputs import reiterable, to_device
from shallower.core.state_file import read_state, write_state
from shallower.errors import SiteError, TrainingError

SCHEMA = 2
"""Version of the checkpoint file."""


class Trainable(Protocol):
    """What the loop needs of a method; see `shallower.methods.base.Method`."""

    def param_groups(self, weight_decay: float = ...) -> list[dict[str, Any]]: ...
    def before_step(self) -> None: ...
    def loss(self, closure: Callable[[], Tensor]) -> Tensor: ...
    def after_step(self, lr: float) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """How to train.

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
        clip: greatest norm of the gradient; None does not clip.
        precision: "no", "bf16" or "fp16"; the latter two are autocast around the model's forward pass.
        seed: of the order of the batches, dropout and augmentation (torch, numpy and Python).
    """

    epochs: int
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    clip: float | None = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            TrainingError: a value is out of its range; the error names it.
        """
        for name, choices in (
            ("optimizer", ("adamw", "sgd")),
            ("schedule", ("cosine", "step", "constant")),
            ("precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in choices:
                raise TrainingError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, valid in (
            ("epochs", self.epochs >= 0),
            ("lr", self.lr > 0),
            ("weight_decay", self.weight_decay >= 0),
            ("momentum", 0 <= self.momentum < 1),
            ("warmup", 0 <= self.warmup < 1),
            ("clip", self.clip is None or self.clip > 0),
        ):
            if not valid:
                raise TrainingError(f"{name}={getattr(self, name)!r} is out of range")

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
        scores: what `score` gave after the epoch; empty without it.
        seconds: wall time, scoring and checkpoints included.
        stopped: the score fell below the floor; the model is the last one that did not.
        resumed: steps that were read from the checkpoint, not trained in this call.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: bool = False
    resumed: int = 0


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    recipe: Recipe,
    *,
    method: Trainable | None = None,
    score: Callable[[nn.Module], float] | None = None,
    floor: float | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 0,
    label: str = "",
    cpu: bool = False,
) -> History:
    """Train `model` in place.

    A step is `method.before_step()`, `method.loss(lambda: loss(model, batch))`, backward, the optimizer's step and
    `method.after_step(lr)`. In several processes each takes every n-th batch of the same order (what does not
    divide is left out of the epoch), and gradients are averaged.

    Args:
        model: the parameters that require a gradient are trained.
        batches: iterated once an epoch, with a length: a list, a DataLoader. Tensors move to the device.
        loss: of the model (wrapped for several processes) and a batch, a scalar tensor.
        recipe: how to train.
        method: attached to `model` already; the optimizer is made from its `param_groups`, and what its `state`
            gives is in the checkpoint. Without one, weights of two dimensions or more decay and the rest does not.
        score: called with the model in eval mode after each epoch, in the model's own precision; higher is better.
        floor: lowest acceptable score. Below it the training stops, and the model goes back to the last state that
            reached it: to its state at the start where none did.
        checkpoint: a file (.safetensors). Where it exists the run goes on from it, exactly; where it holds a
            finished run, nothing is trained. Written atomically after each epoch.
        checkpoint_every: also after so many steps.
        label: what the progress bar says.
        cpu: stay on the CPU even where there is an accelerator.

    Raises:
        TrainingError: there is nothing to train or nothing to train on, the loss is not finite, or the checkpoint
            is damaged or of another run.
    """
    steps_an_epoch = _length(batches)
    if floor is not None and score is None:
        raise TrainingError("floor= needs score=, a function of the model, to compare with")
    training = model.training
    with _accelerator(recipe, cpu) as accelerator:
        run = _Run(accelerator, model, recipe, steps_an_epoch // accelerator.num_processes, method)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            run.load(path)
        elif floor is not None:
            run.keep()
        try:
            with run.prepared() as (wrapped, optimizer):
                run.train(wrapped, optimizer, batches, loss, score, floor, path, checkpoint_every, label)
        finally:
            model.train(training)
    return run.history


class _Run:
    """The state of one call of `train`, all of which goes into the checkpoint."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, recipe: Recipe, steps: int, method: Trainable | None
    ) -> None:
        self.accelerator = accelerator
        self.model = model.to(accelerator.device)
        self.recipe = recipe
        self.method = method
        self.steps = steps
        self.optimizer = _optimizer(model, recipe, method)
        self.history = History()
        self.position = 0
        self.epoch_loss = 0.0
        self.good: dict[str, Tensor] = {}
        self.random_state: list[Any] | None = None
        self.own: dict[str, Any] = {}
        self.finished = recipe.epochs == 0
        if steps == 0:
            raise TrainingError("there are fewer batches than processes; make the batches smaller")

    @contextlib.contextmanager
    def prepared(self) -> Iterator[tuple[nn.Module, Any]]:
        """The model and the optimizer as Accelerate wants them; the model is its own again afterwards."""
        self.own = self.patches()
        try:
            yield self.accelerator.prepare(self.model, self.optimizer)
        finally:
            self.patch(self.own)

    def patches(self) -> dict[str, Any]:
        """What Accelerate puts on a model for mixed precision, as it is now."""
        names = ("forward", "_original_forward", "_is_accelerate_prepared")
        return {name: value for name, value in vars(self.model).items() if name in names}

    def patch(self, values: Mapping[str, Any]) -> None:
        for name in self.patches():
            del vars(self.model)[name]
        vars(self.model).update(values)

    def train(
        self,
        wrapped: nn.Module,
        optimizer: Any,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        score: Callable[[nn.Module], float] | None,
        floor: float | None,
        path: Path | None,
        every: int,
        label: str,
    ) -> None:
        total = self.steps * self.recipe.epochs
        main = self.accelerator.is_main_process
        with tqdm(total=total, initial=self.position, desc=label or "training", disable=not main) as bar:
            while not self.finished:
                epoch, started = self.position // self.steps, time.perf_counter()
                wrapped.train()
                running = torch.full((), self.epoch_loss, device=self.accelerator.device)
                for batch in self.batches(batches, epoch):
                    running += self.step(wrapped, optimizer, loss, to_device(batch, self.accelerator.device))
                    self.position += 1
                    bar.update()
                    done = (self.position - 1) % self.steps + 1
                    save_now = every > 0 and self.position % every == 0 and done < self.steps
                    if save_now or done % 10 == 0 or done == self.steps:
                        self.epoch_loss = float(running)
                        bar.set_postfix(loss=f"{self.epoch_loss / done:.4f}", refresh=False)
                        self.check_loss()
                    if save_now and path is not None:
                        self.save(path)
                self.history.losses.append(self.epoch_loss / self.steps)
                self.epoch_loss = 0.0
                self.finished = epoch + 1 == self.recipe.epochs
                if score is not None:
                    self.judge(score, floor)
                    bar.set_postfix(loss=f"{self.history.losses[-1]:.4f}", score=f"{self.history.scores[-1]:.4f}")
                self.history.seconds.append(time.perf_counter() - started)
                if path is not None:
                    self.save(path)

    def step(self, wrapped: nn.Module, optimizer: Any, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """One step of the optimizer; the loss, detached."""
        lr = self.recipe.lr * self.recipe.factor(self.position, self.steps * self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["initial_lr"] / self.recipe.lr
        if self.method is None:
            value = loss(wrapped, batch)
        else:
            self.method.before_step()
            value = self.method.loss(lambda: loss(wrapped, batch))
        self.accelerator.backward(value)
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(wrapped.parameters(), self.recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if self.method is not None:
            self.method.after_step(lr)
        return value.detach()

    def batches(self, batches: Iterable[Any], epoch: int) -> Iterator[Any]:
        """This process's batches of `epoch`, from the position on.

        The order is drawn from a seed of the epoch, so that it can be drawn again by a run that resumes; the random
        state that the checkpoint holds takes over after what is skipped.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        seed = self.recipe.seed * 1_000_003 + epoch
        _seed(seed)
        for holder in (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                generator.manual_seed(seed)
            if callable(set_epoch := getattr(holder, "set_epoch", None)):
                set_epoch(epoch)
        skipped = self.position % self.steps
        own = islice(batches, rank, self.steps * world, world)
        for number, batch in enumerate(own):
            if number < skipped:
                continue
            if self.random_state is not None:
                _set_random_state(self.random_state[rank])
                self.random_state = None
            elif number == 0 and rank > 0:
                # Only now: the order has been drawn and was the same everywhere, dropout should not be.
                _seed(seed + 7919 * rank)
            yield batch

    def check_loss(self) -> None:
        if not math.isfinite(self.epoch_loss):
            raise TrainingError(
                f"the loss is not finite at step {self.position}: lower the learning rate ({self.recipe.lr:g}), "
                "clip the gradient, or train in higher precision"
            )

    def judge(self, score: Callable[[nn.Module], float], floor: float | None) -> None:
        """Score the model; keep it where it reaches the floor, go back and finish where it does not."""
        self.model.eval()
        # A copy that `score` makes of the model would still call the forward of this one.
        patched = self.patches()
        self.patch(self.own)
        values = [float(score(self.model))]
        self.patch(patched)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(values)
        self.history.scores.append(values[0])
        if floor is None:
            return
        if values[0] >= floor:
            self.keep()
        else:
            self.model.load_state_dict(self.good)
            self.history.stopped = self.finished = True

    def keep(self) -> None:
        self.good = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, path: Path) -> None:
        """Write the checkpoint: the main process does, with the random state of all."""
        random_state: list[Any] = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            state = {
                "schema": SCHEMA,
                "recipe": dataclasses.asdict(self.recipe),
                "steps": self.steps,
                "position": self.position,
                "epoch_loss": self.epoch_loss,
                "history": dataclasses.asdict(self.history),
                "finished": self.finished,
                "random": random_state,
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "good": self.good,
                "method": {} if self.method is None else self.method.state(),
            }
            write_state(path, state)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        state = read_state(path)
        try:
            if state["schema"] != SCHEMA:
                raise TrainingError(f"{path}: a checkpoint of schema {state['schema']}, this version reads {SCHEMA}")
            saved = {**state["recipe"], "steps": state["steps"]}
            own = {**dataclasses.asdict(self.recipe), "steps": self.steps}
            if other := [name for name, value in own.items() if saved.get(name) != value]:
                raise TrainingError(
                    f"{path}: a checkpoint of another run ({', '.join(other)} differ); delete it, or give another path"
                )
            self.position = int(state["position"])
            self.epoch_loss = float(state["epoch_loss"])
            self.history = History(**state["history"])
            self.history.resumed = self.position
            self.finished = bool(state["finished"])
            if len(state["random"]) == self.accelerator.num_processes and self.position % self.steps:
                self.random_state = state["random"]
            self.model.load_state_dict(state["model"])
            self.good = state["good"]
            self.optimizer.load_state_dict(state["optimizer"])
            if self.method is not None:
                self.method.load_state(state["method"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{path}: this checkpoint does not fit this run: {error}") from error
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter, {})
                for name, value in moments.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        # A fused optimizer walks the storages side by side: the same layout for all of them.
                        moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _length(batches: Iterable[Any]) -> int:
    try:
        reiterable(batches)
        length = len(batches)  # type: ignore[arg-type]
    except SiteError as error:
        raise TrainingError(str(error)) from error
    except TypeError:
        raise TrainingError(
            f"a {type(batches).__name__} has no length, which the schedule needs: pass a list or a DataLoader"
        ) from None
    if length == 0:
        raise TrainingError("there are no batches to train on")
    return length


@contextlib.contextmanager
def _accelerator(recipe: Recipe, cpu: bool) -> Iterator[Accelerator]:
    """An Accelerator of this recipe; one that the caller may have is left as it was.

    Accelerate keeps the precision in a singleton, so that a second run of another precision would fail.
    """
    saved = dict(AcceleratorState._shared_state), dict(GradientState._shared_state)
    AcceleratorState._shared_state.clear()
    GradientState._shared_state.clear()
    try:
        yield Accelerator(mixed_precision=recipe.precision, cpu=cpu or not torch.accelerator.is_available())
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise TrainingError(f"precision={recipe.precision!r} does not run on this device: {error}") from error
    finally:
        for state, before in zip((AcceleratorState, GradientState), saved, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)


def _optimizer(model: nn.Module, recipe: Recipe, method: Trainable | None) -> torch.optim.Optimizer:
    if method is not None:
        groups = method.param_groups(weight_decay=recipe.weight_decay)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [{**group, "initial_lr": group.get("lr", recipe.lr)} for group in groups if group["params"]]
    if not groups:
        raise TrainingError("no parameter of the model requires a gradient: there is nothing to train")
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
