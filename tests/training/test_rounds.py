"""Rounds of training: kept, continued, taken back, and refused where they are another run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shallower.core.files import read_state, write_state
from shallower.errors import MethodError
from shallower.training import Checkpoint, History, Recipe
from shallower.training.rounds import Rounds, Training
from shallower.training.trainable import Trainable

RECIPE = Recipe(epochs=2, lr=1e-2)


@dataclass(frozen=True)
class Lap:
    """A finished round."""

    name: str
    score: float | None
    taken_back: bool
    history: History


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))


BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def laps(model: nn.Module, training: Training, count: int = 2, names: Callable[[int], str] = str) -> Rounds[Lap]:
    rounds = Rounds("lap", Lap, Trainable(model), training, {"count": count})
    with rounds:
        while len(rounds.finished) < count and not rounds.over:
            number = len(rounds.finished)
            if not rounds.chosen:
                rounds.chosen = {"name": names(number)}
                rounds.keep()
            outcome = rounds.train(f"lap {number}")
            name, rounds.chosen = rounds.chosen["name"], {}
            rounds.finish(Lap(name, **vars(outcome)))
    return rounds


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def stopping_after(calls: int) -> Callable[[nn.Module, Tensor], Tensor]:
    seen = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise KeyboardInterrupt
        return square(model, batch)

    return loss


def test_an_interrupted_run_continues_to_the_same_weights_and_choices(tmp_path: Path) -> None:
    whole = network()
    expected = laps(whole, Training(BATCHES, square, RECIPE, cpu=True))
    checkpoint = Checkpoint(tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt):
        laps(network(), Training(BATCHES, stopping_after(8), RECIPE, checkpoint=checkpoint, cpu=True))
    resumed = network(seed=9)
    done = laps(
        resumed,
        Training(BATCHES, square, RECIPE, checkpoint=checkpoint, cpu=True),
        names=lambda number: f"new {number}",
    )
    assert [lap.name for lap in done.finished] == [lap.name for lap in expected.finished] == ["0", "1"]
    assert done.finished[1].history.resumed == 2
    assert equal(whole, resumed)


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first, again = network(), network(seed=9)
    done = laps(first, Training(BATCHES, square, RECIPE, checkpoint=tmp_path, cpu=True))
    read = laps(again, Training(BATCHES, stopping_after(0), RECIPE, checkpoint=tmp_path, cpu=True))
    assert read.finished == done.finished
    assert equal(first, again)
    assert [path.name for path in tmp_path.iterdir()] == ["laps.safetensors"]


def test_every_round_has_its_own_seed() -> None:
    first, second = laps(network(), Training(BATCHES, square, Recipe(epochs=1, lr=1e-30), cpu=True)).finished
    assert first.history.losses != second.history.losses


def test_a_round_below_the_floor_is_undone_and_the_last(tmp_path: Path) -> None:
    scores = iter([0.9, 0.1, 0.9])
    states: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        states.append(network())
        states[-1].load_state_dict(model.state_dict())
        return next(scores)

    model = network()
    training = Training(BATCHES, square, RECIPE, score, 0.5, tmp_path, cpu=True)
    rounds = laps(model, training, count=3)
    assert [lap.taken_back for lap in rounds.finished] == [False, True]
    assert rounds.over
    assert equal(model, states[0])
    assert laps(network(), training, count=3).over


def test_a_run_of_another_recipe_or_identity_is_refused(tmp_path: Path) -> None:
    laps(network(), Training(BATCHES, square, RECIPE, checkpoint=tmp_path, cpu=True))
    other = dataclasses.replace(RECIPE, lr=1.0)
    with pytest.raises(MethodError, match=r"another run \(recipe differ"):
        laps(network(), Training(BATCHES, square, other, checkpoint=tmp_path, cpu=True))
    with pytest.raises(MethodError, match=r"another run \(count differ"):
        laps(network(), Training(BATCHES, square, RECIPE, checkpoint=tmp_path, cpu=True), count=3)


@pytest.mark.parametrize("change", ["schema", "rounds", "model", "identity", "extra"])
def test_a_damaged_file_is_refused(tmp_path: Path, change: str) -> None:
    laps(network(), Training(BATCHES, square, RECIPE, checkpoint=tmp_path, cpu=True))
    path = tmp_path / "laps.safetensors"
    state = dict(read_state(path, error=MethodError))
    if change == "extra":
        state["rounds"] = [{**lap, "more": 1} for lap in state["rounds"]]
    elif change == "schema":
        state["schema"] = 99
    else:
        del state[change]
    write_state(path, state, error=MethodError)
    with pytest.raises(MethodError):
        laps(network(), Training(BATCHES, square, RECIPE, checkpoint=tmp_path, cpu=True))


def test_a_floor_needs_a_score() -> None:
    with pytest.raises(MethodError, match="floor= needs score="):
        Training(BATCHES, square, RECIPE, floor=0.5)
