"""A forward pass of ours leaves nothing behind in a user's model or process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shallower.core.inputs import call
from shallower.core.modes import evaluating, without_inference_mode


class Runs(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def test_every_module_is_in_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_modes_come_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(ValueError, match="inside"), evaluating(model):
        raise ValueError("inside")
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_are_as_asked_for(gradients: bool) -> None:
    model = nn.Linear(2, 2)
    for outside in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with outside, evaluating(model, gradients=gradients):
            assert torch.is_grad_enabled() == gradients
            assert not torch.is_inference_mode_enabled()
            assert not torch.ones(1).is_inference()


def test_random_numbers_go_on_as_if_nothing_had_run() -> None:
    model = nn.Linear(2, 2)
    states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    with evaluating(model):
        torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_tensors_that_a_forward_keeps_are_put_back_after_each_pass() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.fc(x)
        m.features, m.last = y, y
        m.maps.append(y)
        m.by_name["x"] = y
        m.fc.seen = (y, [y])
        m.calls += 1
        return y

    first = torch.zeros(1)
    model = Runs(run, fc=nn.Linear(2, 2), last=first, maps=[first], by_name={}, calls=0)
    maps = model.maps
    with evaluating(model):
        for _ in range(3):
            call(model, torch.ones(1, 2))
            assert not hasattr(model, "features")
            assert not hasattr(model.fc, "seen")
            assert model.last is first
            assert model.maps is maps
            assert maps == [first]
            assert not model.by_name
            assert model.calls == 0


def test_models_may_keep_something_from_one_pass_of_their_own_to_the_next() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.state = x + getattr(m, "state", 0)
        return m.state

    model = Runs(run)
    with evaluating(model):
        assert [float(model(torch.ones(()))) for _ in range(3)] == [1, 2, 3]
    assert not hasattr(model, "state")


def test_what_a_part_keeps_is_put_back_at_the_end() -> None:
    model = nn.Sequential(Runs(lambda m, x: setattr(m, "seen", x)))
    with evaluating(model):
        model[0](torch.ones(1))
    assert not hasattr(model[0], "seen")


def test_hooks_that_a_forward_registers_go_and_those_of_others_stay() -> None:
    model = Runs(lambda m, x: (m.fc.register_forward_hook(lambda *_: None), m.fc(x))[1], fc=nn.Linear(2, 2))
    model.use_hooks = True
    with evaluating(model):
        handle = model.fc.register_forward_pre_hook(lambda *_: None)
        call(model, torch.ones(1, 2))
        assert not model.fc._forward_hooks
        assert len(model.fc._forward_pre_hooks) == 1
        handle.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_nothing_is_taken_back_in_training() -> None:
    model = Runs(lambda m, x: setattr(m, "seen", x))
    call(model, torch.ones(1))
    assert hasattr(model, "seen")


def test_attributes_that_hold_no_tensor_stay_as_they_are() -> None:
    model = nn.Linear(2, 2)
    with evaluating(model):
        model.note = ["text"]
        model.scale = 3
    assert model.note == ["text"]
    assert model.scale == 3


def test_padded_encoders_run_without_nested_tensors() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    seen = []
    encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    with evaluating(encoder):
        encoder(torch.randn(2, 4, 8), src_key_padding_mask=torch.tensor([[False] * 4, [False, False, True, True]]))
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
def test_compiled_parts_run_eagerly() -> None:
    ran = []
    part = Runs(lambda _, x: (ran.append(torch.compiler.is_compiling()), x)[1])
    model = nn.Sequential(torch.compile(part, backend="eager"))
    with evaluating(model):
        model(torch.ones(1))
    assert ran == [False]


def test_a_function_can_leave_inference_mode() -> None:
    @without_inference_mode()
    def made() -> Tensor:
        return torch.ones(1)

    with torch.inference_mode():
        assert not made().is_inference()
    assert torch.is_grad_enabled()
    assert made().requires_grad is False
