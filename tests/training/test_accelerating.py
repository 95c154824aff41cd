"""Accelerate leaves nothing behind: not its state, not the model's forward, not its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from shallower.training.accelerating import placed, prepared, started


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """As in a process where nobody has made an Accelerator yet, whatever tests before have done."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    yield
    AcceleratorState._shared_state.clear()
    AcceleratorState._shared_state.update(before)


@pytest.mark.usefixtures("no_accelerator")
def test_an_accelerator_of_the_callers_stays_as_it_is() -> None:
    own = Accelerator(mixed_precision="bf16", cpu=True)
    before = dict(AcceleratorState._shared_state)
    with started("no", cpu=True) as inner:
        assert inner.mixed_precision == "no"
    assert dict(AcceleratorState._shared_state) == before
    assert own.mixed_precision == "bf16"


def test_the_models_forward_is_its_own_inside_a_score_and_afterwards() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with started("bf16", cpu=True) as accelerator, prepared(accelerator, model, optimizer) as pair:
        assert "forward" in vars(model)
        with pair.own_forward() as bare:
            assert bare is model
            assert "forward" not in vars(model)
        assert "forward" in vars(model)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(model))


class Moved(nn.Linear):
    """Writes down where it is moved to."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.moves: list[str] = []

    def to(self, *args: Any, **_: Any) -> Moved:  # type: ignore[override]
        self.moves.append(str(args[0]))
        return self


def test_a_model_goes_back_to_its_device_after_an_error_too() -> None:
    model = Moved()
    with pytest.raises(KeyboardInterrupt), placed(model, torch.device("meta")):
        raise KeyboardInterrupt
    assert model.moves == ["meta", "cpu"]


def test_a_model_that_is_there_already_is_not_moved() -> None:
    model = Moved()
    with placed(model, torch.device("cpu")):
        pass
    assert model.moves == []
