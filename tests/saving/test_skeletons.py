"""Architectures are built without weights, within limits, and offline."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from shallower.errors import CheckpointError, ModelError
from shallower.saving import skeletons
from shallower.saving.skeletons import Limits, build_skeleton

SOURCE = "torchvision:resnet18?num_classes=3"


def test_parameters_are_on_the_meta_device_and_buffers_are_real() -> None:
    skeleton = build_skeleton(SOURCE)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())


def test_random_numbers_go_on_as_if_nothing_had_been_built() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_skeleton(SOURCE)
    assert torch.equal(torch.rand(3), expected)


def test_a_draft_that_does_not_fit_ends_it() -> None:
    def fits(draft: nn.Module) -> None:
        assert all(tensor.is_meta for tensor in draft.state_dict().values())
        raise CheckpointError("another one")

    with pytest.raises(CheckpointError, match="another one"):
        build_skeleton(SOURCE, fits=fits)


def test_more_parameters_than_the_files_have_are_too_many() -> None:
    build_skeleton(SOURCE, limits=Limits(100, 512))
    with pytest.raises(ModelError, match="more than 20 parameters"):
        build_skeleton(SOURCE, limits=Limits(20, 512))


def test_a_constructor_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> nn.Module:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(skeletons, "torchvision", endless)
    monkeypatch.setattr(Limits, "seconds", 0.3)
    with pytest.raises(ModelError, match="takes longer than 0 s to build"):
        build_skeleton(SOURCE, limits=Limits(100, 512))
    time.sleep(0.5)  # nothing is raised later


def test_a_model_that_is_made_in_another_thread_meanwhile_has_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    made: list[nn.Linear] = []

    def building(*_: Any) -> nn.Module:
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return nn.Linear(3, 3)

    monkeypatch.setattr(skeletons, "torchvision", building)
    assert build_skeleton(SOURCE, limits=Limits(100, 512)).get_parameter("weight").is_meta
    assert not any(layer.weight.is_meta for layer in made)


def test_the_hub_is_offline_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    def building(*_: Any) -> nn.Module:
        seen.append(constants.HF_HUB_OFFLINE)
        return nn.Linear(3, 3)

    monkeypatch.setattr(skeletons, "torchvision", building)
    build_skeleton(SOURCE)
    assert set(seen) == {True}
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("number", [{"__float__": []}, {"__float__": "x"}, {"__float__": None}])
def test_a_number_of_a_config_that_is_none(number: Any) -> None:
    with pytest.raises(ModelError, match="its config cannot be read"):
        build_skeleton("transformers:BertModel", {"layer_norm_eps": number})
