"""The rounds of Till the Layers Collapse: how many sites go in each, and what each did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shallower.errors import MethodError
from shallower.training.recipe import History


@dataclass(frozen=True)
class Round:
    """One round of `TillLayersCollapse.fit`.

    Attributes:
        linearised: names of the sites whose activation went in this round.
        removed: names of all sites that are linear after it.
        costs: what each site was taken to cost at the start of the round, cheapest first; in the unit of the criterion.
        base: validation loss at the start of the round; None without validation batches.
        joint: validation loss with the round's sites linear, before the training; None likewise.
        score: of the model at its end; None without `score`.
        taken_back: the score was under the floor, so that the model is as it was before the round.
        history: of the training.
    """

    linearised: tuple[str, ...]
    removed: tuple[str, ...]
    costs: Mapping[str, float]
    base: float | None
    joint: float | None
    score: float | None
    taken_back: bool
    history: History


@dataclass(frozen=True)
class Pace:
    """How fast `TillLayersCollapse.fit` takes activations away.

        method.fit(loader, task_loss, recipe, sh.Pace(per_round=2, rounds=3))

    Attributes:
        per_round: so many a round, at most; None: as many as leave the validation loss no higher, and 1 where there are
            no validation batches.
        rounds: at most so many; None: until no activation is left.

    Raises:
        MethodError: a number is less than 1.
    """

    per_round: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers less than 1."""
        for name in ("per_round", "rounds"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise MethodError(f"{name}={value!r}: pass a number of at least 1, or None")

    @property
    def most(self) -> float:
        """The number of rounds after which it ends."""
        return math.inf if self.rounds is None else self.rounds
