"""The options of the command line as data."""

from __future__ import annotations

from dataclasses import fields

import pytest

from shallower.app.options import METHODS, DataOptions, RunOptions, Squeezing, TrainingOptions
from shallower.app.runs import run_of
from shallower.errors import DataError, MethodError


def test_every_method_has_a_run_with_its_options() -> None:
    for name, kind in METHODS.items():
        run = run_of(kind())
        assert isinstance(run, kind)
        assert run.name == name


def test_every_option_says_what_it_means() -> None:
    for kind in (DataOptions, TrainingOptions, RunOptions, *METHODS.values()):
        for field in fields(kind):
            text = field.metadata["text"]
            assert text.endswith(".")
            assert text[0].isupper()


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        DataOptions(batch_size=0)
    with pytest.raises(MethodError, match="seed=-1"):
        RunOptions(seed=-1)


def test_squeezing_trains_only_to_heal() -> None:
    assert not Squeezing().trains
    assert Squeezing(heal=1).trains
