"""Recipes are validated before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shallower.errors import TrainingError
from shallower.training.recipe import Checkpoint, Recipe


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 1.5},
        {"epochs": -1},
        {"epochs": True},
        {"epochs": float("inf")},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "1e-3"},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"momentum": 1.0},
        {"warmup": 1.0},
        {"gamma": 0.0},
        {"milestones": (0.5, 2.0)},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"seed": -1},
        {"seed": 2**70},
        {"seed": 0.5},
        {"optimizer": "adam"},
        {"schedule": "linear"},
        {"precision": "fp8"},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=next(iter(change))):
        dataclasses.replace(Recipe(epochs=1, lr=1e-2), **change)  # type: ignore[arg-type]


def test_no_epochs_and_no_clipping_are_allowed() -> None:
    recipe = Recipe(epochs=0, lr=1e-2, clip=None, warmup=0, weight_decay=0)
    assert recipe.epochs == 0


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    factors = [Recipe(epochs=1, lr=1.0, warmup=0.25).factor(step, 8) for step in range(8)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.1


def test_a_step_schedule_falls_at_its_milestones() -> None:
    recipe = Recipe(epochs=1, lr=1.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [recipe.factor(step, 4) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


def test_a_path_is_a_checkpoint_after_every_epoch() -> None:
    assert Checkpoint.of(None) is None
    assert Checkpoint.of("a/b") == Checkpoint("a/b", every=0)
    own = Checkpoint(Path("a"), every=5)
    assert Checkpoint.of(own) is own
    assert own.inside("b").file == Path("a/b")
    assert own.inside("b").every == 5
