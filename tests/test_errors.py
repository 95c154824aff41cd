"""Every error is Shallower's and one of Python's."""

from __future__ import annotations

import inspect

import pytest

from shallower import errors
from shallower.errors import CheckpointError, PlanError, Refusal, ShallowerError, SurgeryError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ShallowerError)]


@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not ShallowerError])
def test_every_error_is_one_of_shallower_and_one_of_python(kind: type[ShallowerError]) -> None:
    assert kind.__bases__[0] is ShallowerError
    assert kind.__bases__[1] in (ValueError, RuntimeError, MemoryError)
    with pytest.raises(ShallowerError, match="what and what to do"):
        raise kind("what and what to do")


def test_what_does_not_fit_is_a_value_error() -> None:
    assert issubclass(PlanError, ValueError)
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(SurgeryError, RuntimeError)


def test_a_refusal_is_its_reason_and_never_false() -> None:
    assert str(Refusal("")) == ""
    assert Refusal("")
    assert Refusal("a") == Refusal("a")
