"""How a batch is handed to a model."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.core.inputs import call, default_inputs_of, default_mask_of, model_device, reiterable
from shallower.errors import ShallowerError

Pair = namedtuple("Pair", ["a", "b"])


class Sum(nn.Module):
    """Adds its two arguments."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@pytest.mark.parametrize(
    "inputs", [(1, 2), [1, 2], {"a": 1, "b": 2}, Pair(1, 2)], ids=["tuple", "list", "dict", "namedtuple"]
)
def test_arguments_by_position_or_by_name(inputs: Any) -> None:
    assert call(Sum(), inputs) == 3


def test_a_tensor_is_the_one_argument_and_other_things_are_refused() -> None:
    assert torch.equal(call(nn.Identity(), torch.ones(2)), torch.ones(2))
    with pytest.raises(ShallowerError, match="not with a set"):
        call(nn.Identity(), {1})  # type: ignore[arg-type]


def test_an_error_of_the_model_is_one_of_ours_with_its_cause() -> None:
    class Broken(nn.Module):
        def forward(self, _x: Tensor) -> Tensor:
            raise KeyError("no such thing")

    with pytest.raises(ShallowerError, match="no such thing") as caught:
        call(Broken(), torch.ones(1))
    assert isinstance(caught.value.__cause__, KeyError)


def test_inputs_are_told_from_labels() -> None:
    x, labels = torch.ones(2), torch.zeros(2)
    assert default_inputs_of((x, labels)) is x
    assert default_inputs_of({"input_ids": x, "labels": labels}) == {"input_ids": x}
    assert default_inputs_of(x) is x
    assert len(default_inputs_of((x, x, labels))) == 3


def test_the_mask_of_a_batch_has_two_dimensions() -> None:
    mask = torch.ones(2, 3)
    assert default_mask_of({"attention_mask": mask}) is mask
    assert default_mask_of(({"attention_mask": mask}, None)) is mask
    assert default_mask_of({"attention_mask": mask[None, None]}) is None
    assert default_mask_of(mask) is None


def test_an_iterator_is_refused_and_a_list_is_not() -> None:
    assert reiterable([1]) == [1]
    with pytest.raises(ShallowerError, match="iterator"):
        reiterable(iter([1]))


def test_the_device_of_a_model() -> None:
    assert model_device(nn.Linear(1, 1, device="meta")).type == "meta"
    assert model_device(nn.Identity()).type == "cpu"
