"""The built-in training loop: plain supervised training, with or without a method attached, on Accelerate.

    recipe = sh.Recipe(epochs=3, lr=5e-5, warmup=0.1)
    history = sh.train(model, loader, lambda model, batch: model(**batch).loss, recipe, method=method, checkpoint=path)

The same call runs on one CPU, on one GPU, and in several processes under `accelerate launch` or
`python -m torch.distributed.run`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.core.codec import decode
from shallower.core.failures import failing
from shallower.core.files import read_state, write_state
from shallower.core.inputs import reiterable
from shallower.core.modes import in_eval_mode, same_modes
from shallower.core.processes import agreed_result, gathered, raised_anywhere
from shallower.core.trees import tensors, to_device
from shallower.errors import ForwardError, ShallowerError, SiteError, TrainingError
from shallower.training.accelerating import Prepared, placed, prepared, started
from shallower.training.randomness import kept, seed, seed_order, set_state, state
from shallower.training.recipe import Checkpoint, History, Recipe
from shallower.training.trainable import Trainable

Loss = Callable[[nn.Module, Any], Tensor]
"""Of the model and a batch, a scalar tensor."""
Score = Callable[[nn.Module], float]
"""Of the model, higher is better."""

TRAINING_FORMAT = 3
"""Version of the checkpoint file."""

_FAILURES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""What Python and torch raise; a class of the user's own, which may end a training on purpose, is none of them."""

_CHECK_EVERY = 10
"""Steps between two looks at the loss, each of which waits for the device."""


class DivergedError(TrainingError):
    """The loss is no longer a number, and the data are not to blame."""


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    recipe: Recipe,
    *,
    method: Trainable | None = None,
    score: Score | None = None,
    floor: float | None = None,
    checkpoint: Checkpoint | Path | str | None = None,
    label: str = "training",
    cpu: bool = False,
) -> History:
    """Train `model` in place.

        history = sh.train(model, loader, lambda model, batch: model(**batch).loss, sh.Recipe(epochs=3, lr=5e-5))

    A step is `method.before_step()`, `method.loss(lambda: loss(model, batch))`, backward, the optimizer's step and
    `method.after_step(lr)`. In several processes each takes every n-th batch of the same order (what does not
    divide is left out of the epoch), and gradients are averaged. Afterwards the model is on the device and in the mode
    it came in, and the random generators of the process are where they were.

    Args:
        model: the parameters that require a gradient are trained.
        batches: iterated once an epoch, with a length: a list, a DataLoader. Tensors move to the device.
        loss: of the model (wrapped for several processes) and a batch, a scalar tensor.
        recipe: how to train.
        method: attached to `model` already; the optimizer is made from its `param_groups`, and its `state_dict` is in
            the checkpoint. Without one, weights of two dimensions or more decay and the rest does not.
        score: called with the model in eval mode after each epoch, in the model's own precision; higher is better.
        floor: lowest acceptable score. Below it the training stops, and the model goes back to the last state that
            reached it: to its state at the start where none did.
        checkpoint: a file (.safetensors), or a `Checkpoint` to write it also within an epoch. Where it exists the run
            continues from it, exactly; where it holds a finished run, nothing is trained.
        label: shown with the progress bar.
        cpu: stay on the CPU even where there is an accelerator.

    Raises:
        TrainingError: there is nothing to train or nothing to train on, the model or the loss fails on a batch, the
            loss is not a finite scalar, or the checkpoint is damaged or of another run.
    """
    steps = _steps_of(batches)
    if floor is not None and score is None:
        raise TrainingError("floor= needs score=, a function of the model, to compare with")
    if recipe.patience is not None and score is None:
        raise TrainingError("a recipe with patience needs score=, a function of the model, to compare with")
    with (
        started(recipe.precision, cpu) as accelerator,
        kept(accelerator.device, batches),
        placed(model, accelerator.device),
        same_modes(model),
    ):
        run = _Run(accelerator, recipe, steps // accelerator.num_processes, method or Trainable(model), model)
        run.score, run.floor, run.checkpoint = score, floor, Checkpoint.of(checkpoint)
        run.start()
        with prepared(accelerator, model, run.optimizer) as pair:
            run.score_before(pair)
            run.train(pair, batches, loss, label)
    return run.history


class _Run:
    """The state of one call of `train`, all of which goes into the checkpoint."""

    score: Score | None = None
    floor: float | None = None
    checkpoint: Checkpoint | None = None

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, steps: int, method: Trainable, model: nn.Module
    ) -> None:
        if steps == 0:
            raise TrainingError("there are fewer batches than processes: make the batches smaller")
        self.accelerator = accelerator
        self.recipe = recipe
        self.steps = steps
        self.method = method
        self.model = model
        self.optimizer = _optimizer(recipe, method)
        self.history = History()
        self.waited = 0
        self.position = 0
        self.epoch_loss = 0.0
        self.good: dict[str, Tensor] = {}
        self.random_state: list[Any] | None = None
        self.finished = recipe.epochs == 0
        self.recent: deque[tuple[int, Any]] = deque(maxlen=_CHECK_EVERY)

    def start(self) -> None:
        """From the checkpoint where there is one."""
        if self.checkpoint is not None and self.checkpoint.file.exists():
            self.load(self.checkpoint.file)
        elif self.floor is not None or self.recipe.patience is not None:
            self.keep()

    def score_before(self, pair: Prepared) -> None:
        """What a training that keeps the best state has to be better than."""
        if self.recipe.patience is not None and self.score is not None and self.history.before is None:
            self.history.before = self.scored(pair, self.score)

    def train(self, pair: Prepared, batches: Iterable[Any], loss: Loss, label: str) -> None:
        total, main = self.steps * self.recipe.epochs, self.accelerator.is_main_process
        with tqdm(total=total, initial=self.position, desc=label, delay=2, leave=False, disable=not main) as bar:
            while not self.finished:
                started_at = time.perf_counter()
                self.epoch(pair, batches, loss, bar)
                self.history.losses.append(self.epoch_loss / self.steps)
                self.epoch_loss = 0.0
                self.finished = self.position == total
                seen = {"loss": f"{self.history.losses[-1]:.4f}"}
                if self.score is not None:
                    self.judge(pair, self.score)
                    seen["score"] = f"{self.history.scores[-1]:.4f}"
                bar.set_postfix(seen)
                self.history.seconds.append(time.perf_counter() - started_at)
                self.save()

    def epoch(self, pair: Prepared, batches: Iterable[Any], loss: Loss, bar: Any) -> None:
        """What is left of one pass over the batches."""
        device = self.accelerator.device
        every = 0 if self.checkpoint is None else self.checkpoint.every
        pair.model.train()
        running = torch.full((), self.epoch_loss, device=device)
        for batch in self.batches(batches):
            self.recent.append((self.position, batch))
            with _failing(f"step {self.position + 1}: the model or the loss fails on this batch"):
                running += self.step(pair, loss, to_device(batch, device))
            self.position += 1
            bar.update()
            done = (self.position - 1) % self.steps + 1
            save_now = every > 0 and self.position % every == 0 and done < self.steps
            if save_now or done % _CHECK_EVERY == 0 or done == self.steps:
                self.epoch_loss = float(running)
                bar.set_postfix(loss=f"{self.epoch_loss / done:.4f}", refresh=False)
                self.check_loss()
            if save_now:
                self.save()

    def step(self, pair: Prepared, loss: Loss, batch: Any) -> Tensor:
        """One step of the optimizer; the loss, detached."""
        factor = self.recipe.factor(self.position, self.steps * self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        self.method.before_step()
        value = _scalar(self.method.loss(lambda: _of_the_task(loss(pair.model, batch))))
        self.accelerator.backward(value)
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(pair.model.parameters(), self.recipe.clip)
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        self.method.after_step(factor * self.recipe.lr)
        return value.detach().reshape(())

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """This process's batches of the epoch, from the position on.

        The order is drawn from a seed of the epoch, so that it can be drawn again by a run that resumes; the random
        state that the checkpoint holds takes over after what is skipped.
        """
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        epoch, skipped = divmod(self.position, self.steps)
        number = self.recipe.seed * 1_000_003 + epoch
        seed(number, device)
        seed_order(batches, number, epoch)
        own = islice(batches, rank, self.steps * world, world)
        for place in range(self.steps):
            with _failing(f"batch {place * world + rank + 1} cannot be read"):
                batch = next(own, self)
            if batch is self:
                raise TrainingError(
                    f"the batches ended after {place * world + rank}, and their length is {len(batches)}"  # type: ignore[arg-type]
                )
            if place < skipped:
                continue
            if self.random_state is not None:
                set_state(self.random_state[rank], device)
                self.random_state = None
            elif place == 0 and rank > 0:
                # Only now: the order has been drawn and was the same everywhere, dropout should not be.
                seed(number + 7919 * rank, device)
            yield batch

    def check_loss(self) -> None:
        """Refuse a loss that is not finite, with the reason where the data hold it."""
        if math.isfinite(self.epoch_loss):
            return
        for position, batch in self.recent:
            if not all(torch.isfinite(t).all() for t in tensors(batch) if t.is_floating_point()):
                raise TrainingError(
                    f"the batch of step {position + 1} contains NaN or infinite values, and the loss is not finite: "
                    "clean the data"
                )
        raise DivergedError(
            f"the loss is not finite at step {self.position}: lower the learning rate ({self.recipe.lr:g}), "
            "clip the gradient, or train in higher precision"
        )

    def judge(self, pair: Prepared, score: Score) -> None:
        """Score the model; keep it where it reaches the floor, go back and finish where it does not."""
        value, best = self.scored(pair, score), self.history.best
        self.history.scores.append(value)
        if self.floor is not None and not value >= self.floor:
            self.history.stopped = True
        elif self.recipe.patience is None:
            if self.floor is not None:
                self.keep()
        elif best is None or value > best:
            self.waited = 0
            self.keep()
        else:
            self.waited += 1
            self.history.stopped = self.waited >= self.recipe.patience and not self.finished
        self.finished = self.finished or self.history.stopped
        if self.history.stopped or (self.finished and self.recipe.patience is not None):
            self.model.load_state_dict(self.good)

    def scored(self, pair: Prepared, score: Score) -> float:
        """The first process's score of the model, in all of them."""
        with in_eval_mode(self.model), pair.own_forward() as model:
            return float(agreed_result(score, model))

    def keep(self) -> None:
        self.good = copied_state(self.model)

    def save(self) -> None:
        """Write the checkpoint: the main process does, with the random state of all."""
        if self.checkpoint is None:
            return
        random_state = gathered(state(self.accelerator.device))
        with raised_anywhere():
            if not self.accelerator.is_main_process:
                return
            found = {
                "schema": TRAINING_FORMAT,
                "recipe": dataclasses.asdict(self.recipe),
                "steps": self.steps,
                "position": self.position,
                "epoch_loss": self.epoch_loss,
                "history": dataclasses.asdict(self.history),
                "finished": self.finished,
                "waited": self.waited,
                "random": random_state,
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "good": self.good,
                "method": self.method.state_dict(),
            }
            write_state(self.checkpoint.file, found, error=TrainingError)

    def load(self, path: Path) -> None:
        found = read_state(path, error=TrainingError)
        try:
            if found["schema"] != TRAINING_FORMAT:
                raise TrainingError(
                    f"{path}: a checkpoint of version {found['schema']}, and this release reads {TRAINING_FORMAT}"
                )
            saved = {**found["recipe"], "steps": found["steps"]}
            own = {**dataclasses.asdict(self.recipe), "steps": self.steps}
            if other := [name for name, value in own.items() if saved.get(name) != value]:
                raise TrainingError(
                    f"{path}: a checkpoint of another run ({', '.join(other)} differ); delete it, or pass another path"
                )
            self.position = int(found["position"])
            self.epoch_loss = float(found["epoch_loss"])
            self.history = decode(History, found["history"], at=f"{path}: history", error=TrainingError)
            self.history.resumed = self.position
            self.finished, self.waited = bool(found["finished"]), int(found["waited"])
            if len(found["random"]) == self.accelerator.num_processes and self.position % self.steps:
                self.random_state = found["random"]
            self.good = found["good"]
            self.optimizer.load_state_dict(found["optimizer"])
            self.method.load_state_dict(found["method"])
            # last, so that a checkpoint that is refused leaves the model as it was
            self.model.load_state_dict(found["model"])
        except ShallowerError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{path}: this checkpoint does not fit this run: {error}") from error
        _same_layout(self.optimizer)


def recipe_in(path: Path) -> tuple[Recipe, int]:
    """The recipe of the training whose checkpoint this is, and the steps of a pass.

        recipe, steps = recipe_in(Path("run.safetensors"))

    Raises:
        TrainingError: it is damaged, or of another version.
    """
    found = read_state(path, error=TrainingError)
    if found.get("schema") != TRAINING_FORMAT or not isinstance(found.get("steps"), int):
        raise TrainingError(f"{path}: not a checkpoint of this release of Shallower; delete it, or pass another path")
    recipe: Recipe = decode(Recipe, found.get("recipe"), at=f"{path}: recipe", error=TrainingError)
    return recipe, found["steps"]


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state is now, on the CPU, for `load_state_dict`."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _same_layout(optimizer: torch.optim.Optimizer) -> None:
    """Moments in the layout of their parameters: a fused optimizer walks the storages side by side."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _steps_of(batches: Iterable[Any]) -> int:
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


def _optimizer(recipe: Recipe, method: Trainable) -> torch.optim.Optimizer:
    groups = method.param_groups(weight_decay=recipe.weight_decay)
    groups = [{**group, "initial_lr": group.get("lr", recipe.lr)} for group in groups if group["params"]]
    if not groups:
        raise TrainingError("no parameter of the model requires a gradient: there is nothing to train")
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.memory), fused=fused)


def _of_the_task(value: Any) -> Any:
    """What `loss` returned, checked before a penalty that has a gradient of its own is added to it."""
    _scalar(value[0] if isinstance(value, tuple) else value)
    return value


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TrainingError(
            f"the loss is a {type(value).__name__}; return the tensor itself, without .item() or float()"
        )
    if value.numel() != 1:
        raise TrainingError(f"the loss has shape {tuple(value.shape)}; return a scalar, for instance loss.mean()")
    if not value.requires_grad:
        raise TrainingError(
            "the loss does not depend on any parameter that requires a gradient: compute it from the model's output, "
            "without no_grad() or detach()"
        )
    return value


@contextmanager
def _failing(where: str) -> Iterator[None]:
    """What fails in a model, a loss or a loader is one sentence; exceptions of the user's own classes pass."""
    try:
        yield
    except ForwardError as error:
        raise TrainingError(f"{where}: {error}") from error
    except _FAILURES as error:
        with failing(TrainingError, where):
            raise error
