"""Records of surgery in a config."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import CheckpointError
from shallower.modules.edits import Attribute, Resize, Sized, perform
from shallower.saving.stock.recorded import is_record, rebuilt, surgery_record, without_record


class Inner(nn.Module):
    base_model_prefix = "inner"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("table", torch.zeros(4), persistent=False)


class Outer(nn.Module):
    base_model_prefix = "inner"

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(4, 2)


def narrowed(model: nn.Module, prefix: str) -> nn.Module:
    perform(model, Resize(f"{prefix}layer", "linear", 3, 2, True))
    return model


def test_a_record_fits_the_model_with_a_head_and_without() -> None:
    outer = narrowed(Outer(), "inner.")
    perform(outer, Resize("head", "linear", 2, 2, True))
    inside, around = Inner(), Outer()
    rebuilt(inside, surgery_record(outer))
    rebuilt(around, surgery_record(narrowed(Inner(), "")))
    assert inside.layer.out_features == around.inner.layer.out_features == 2
    assert around.head.in_features == 4


def test_what_a_record_cannot_say_is_refused() -> None:
    model = Inner()
    perform(model, Sized("", "table", (2,)))
    with pytest.raises(CheckpointError, match=r"`\.table` is a buffer that Transformers does not save"):
        rebuilt(Inner(), surgery_record(model))


@pytest.mark.parametrize("changed", [{"version": 2}, {"edits": None}, {"edits": [{"edit": "rm -rf"}]}, {"edits": [3]}])
def test_malformed_records_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        rebuilt(Inner(), surgery_record(narrowed(Inner(), "")) | changed)


def test_a_record_of_another_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    perform(model, Attribute("0", "in_features", 5))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        rebuilt(Inner(), surgery_record(model))


def test_records_are_told_from_quantization() -> None:
    assert is_record(surgery_record(Inner()))
    assert not is_record({"quant_method": "awq"})
    assert without_record({"quantization_config": {"quant_method": "awq"}}) != {}
    assert without_record({"quantization_config": surgery_record(Inner())}) == {}
