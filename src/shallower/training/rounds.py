"""Training in rounds, each kept when it ends, so that the same call continues after an interruption.

rounds = Rounds("round", Round, method, Training(batches, loss, recipe, checkpoint="run/"))
with rounds:
    while more and not rounds.over:
        outcome = rounds.train("round 1 of 3", begin=lambda: method.linearise(names))
        rounds.finish(Round(names, outcome.history))
rounds.finished
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from shallower.core.codec import decode
from shallower.core.files import read_state, write_state
from shallower.core.modes import evaluating
from shallower.core.processes import agreed_result, is_first, raised_anywhere
from shallower.errors import MethodError, OutOfMemoryError, ShallowerError
from shallower.training.accelerating import placed, started
from shallower.training.loop import Loss, Score, copied_state, train
from shallower.training.randomness import kept
from shallower.training.recipe import Checkpoint, History, Recipe
from shallower.training.trainable import Trainable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

ROUNDS_FORMAT = 2
"""Version of the file that rounds are kept in."""


@dataclass(frozen=True)
class Training:
    """How every round trains, and what its model must reach.

    Attributes:
        batches, loss, recipe, cpu: see `train`; the recipe's seed is that of the first round.
        score: of the model, higher is better, taken after each round.
        floor: lowest score accepted. A round that ends below it is undone and is the last.
        checkpoint: a folder, or a `Checkpoint` of one.
    """

    batches: Iterable[Any]
    loss: Loss
    recipe: Recipe
    score: Score | None = None
    floor: float | None = None
    checkpoint: Checkpoint | Path | str | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        """Refuse a floor without a score.

        Raises:
            MethodError: there is nothing to compare the floor with.
        """
        if self.floor is not None and self.score is None:
            raise MethodError("floor= needs score=, a function of the model, to compare with")


@dataclass(frozen=True)
class Ended:
    """How a round ended.

    Attributes:
        history: of its training.
        score: of the model at its end; None without `score`.
        taken_back: the score was under the floor, so that the model is as it was before the round.
    """

    history: History
    score: float | None
    taken_back: bool


class Rounds(Generic[R]):
    """Rounds of one method's training; a context, inside which the model is on the device that trains.

    Args:
        name: of a round, for the files and the messages.
        record: the frozen dataclass that a finished round is kept as.
        method: attached to the model.
        training: how every round trains.
        identity: what has to be equal for a run to continue, besides the recipe and the names of the sites.

    Attributes:
        finished: the rounds so far, in order.
        chosen: what was decided before a round and must not be decided anew by a run that continues.

    Raises:
        MethodError: the checkpoint is damaged, of another run, or cannot be written.
    """

    def __init__(
        self,
        name: str,
        record: type[R],
        method: Trainable,
        training: Training,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.record = record
        self.method = method
        self.model = method.model
        self.training = training
        self.identity = {"recipe": dataclasses.asdict(training.recipe), **(identity or {})}
        self.checkpoint = Checkpoint.of(training.checkpoint)
        self.finished: list[R] = []
        self.chosen: dict[str, Any] = {}
        self.over = False
        self.processes = 1
        self._open = ExitStack()
        if self.checkpoint is not None and self._file.exists():
            self._resume()

    def __enter__(self) -> Rounds[R]:
        with ExitStack() as stack:
            accelerator = stack.enter_context(started("no", self.training.cpu))
            self.processes = accelerator.num_processes
            stack.enter_context(kept(accelerator.device, self.training.batches))
            stack.enter_context(placed(self.model, accelerator.device))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def train(
        self, label: str, *, begin: Callable[[], object] | None = None, end: Callable[[], object] | None = None
    ) -> Ended:
        """Train one round.

        Args:
            label: shown with the progress bar.
            begin: changes the model before the training; undone with it where the score is under the floor.
            end: called after the training, before the score is taken.
        """
        training, number = self.training, len(self.finished)
        before: dict[str, Tensor] = {}
        if training.floor is not None:
            before = copied_state(self.model)
        if begin is not None:
            begin()
        history = train(
            self.model,
            training.batches,
            training.loss,
            dataclasses.replace(training.recipe, seed=training.recipe.seed + number),
            method=self.method,
            checkpoint=self._part(number),
            label=label,
            cpu=training.cpu,
        )
        if end is not None:
            end()
        score = self._score()
        self.over = training.floor is not None and score is not None and score < training.floor
        if self.over:
            self.model.load_state_dict(before)
        return Ended(history, score, self.over)

    def finish(self, record: R) -> None:
        """The round is over: keep it, with what is `chosen` for the next."""
        part = self._part(len(self.finished))
        self.finished.append(record)
        self.keep()
        if part is not None and is_first():
            part.file.unlink(missing_ok=True)

    def keep(self) -> None:
        """Write the rounds so far, what is chosen, and the model."""
        if self.checkpoint is None:
            return
        with raised_anywhere():
            if not is_first():
                return
            state = {
                "schema": ROUNDS_FORMAT,
                "identity": self.identity,
                "rounds": [dataclasses.asdict(record) for record in self.finished],
                "chosen": self.chosen,
                "model": dict(self.model.state_dict()),
            }
            write_state(self._file, state, error=MethodError)

    @property
    def steps(self) -> int:
        """Steps of the optimizer in one round; 0 where the batches have no length, which `train` refuses."""
        batches = self.training.batches
        length = len(batches) if isinstance(batches, Sized) else 0
        return self.training.recipe.epochs * (length // self.processes)

    @property
    def _file(self) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint.file / f"{self.name}s.safetensors"

    def _part(self, number: int) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        return self.checkpoint.inside(f"{self.name}-{number + 1}.safetensors")

    def _score(self) -> float | None:
        """The first process's score, so that all decide alike; all compute it, since a sharded model needs them all."""
        if self.training.score is None:
            return None
        with evaluating(self.model):
            return float(agreed_result(self.training.score, self.model))

    def _resume(self) -> None:
        try:
            own = self.identity
            state = _upgraded(read_state(self._file, error=MethodError), own)
            if other := [name for name in own if state["identity"].get(name) != own[name]]:
                raise MethodError(f"{self._file} is of another run ({', '.join(other)} differ): pass another folder")
            at = f"{self._file}: rounds"
            self.finished = [decode(self.record, r, at=at, error=MethodError) for r in state["rounds"]]
            self.chosen = dict(state["chosen"])
            self.over = bool(state["rounds"]) and state["rounds"][-1]["taken_back"]
            # last, so that a file that is refused leaves the model as it was
            self.model.load_state_dict(state["model"])
        except (MethodError, OutOfMemoryError):
            raise
        except (ShallowerError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise MethodError(f"{self._file} does not fit this run ({error}): pass another folder") from error


def _upgraded(state: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file of version 1, which each method wrote in its own way, as one of version 2.

    LayerCollapse kept nothing of its options there but the recipe: the others are taken for equal.

    Raises:
        MethodError: the version is unknown.
    """
    if state["schema"] == ROUNDS_FORMAT:
        return state
    if state["schema"] != 1:
        raise MethodError(f"the file has version {state['schema']}, and this release reads 1 and {ROUNDS_FORMAT}")
    if "stages" in state:
        identity, chosen = {**own, "recipe": state["recipe"]}, {"groups": state["groups"]}
        return {"identity": identity, "rounds": state["stages"], "chosen": chosen, "model": state["model"]}
    return {
        "identity": state["settings"],
        "rounds": state["rounds"],
        "chosen": state["pending"],
        "model": state["model"],
    }
