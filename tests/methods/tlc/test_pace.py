"""How many sites go in a round, and how many rounds there are."""

from __future__ import annotations

import math

import pytest

from shallower.errors import MethodError
from shallower.methods.tlc.pace import Pace


def test_without_a_number_there_is_no_end() -> None:
    assert Pace().most == math.inf
    assert Pace(rounds=3).most == 3


@pytest.mark.parametrize("numbers", [{"per_round": 0}, {"rounds": 0}, {"rounds": -1}, {"per_round": float("nan")}])
def test_numbers_under_one_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=next(iter(numbers))):
        Pace(**numbers)  # type: ignore[arg-type]
