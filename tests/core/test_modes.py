"""A forward pass of ours leaves nothing behind in a user's model or process."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.core.inputs import call
from shallower.core.modes import (
    compute_anew,
    evaluating,
    in_eval_mode,
    same_modes,
    single_pass,
    unchanged,
    without_inference_mode,
)

WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.n.add_(1),
    "another tensor": lambda m: setattr(m, "n", m.n + 1),
    "another shape": lambda m: m.n.resize_(3).fill_(1),
    "a buffer of its own": lambda m: m.register_buffer("m", torch.ones(1), persistent=False),
    "no buffer any more": lambda m: delattr(m, "n"),
}


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


def counting(write: Callable[[Any], object] = WRITES["in place"]) -> Runs:
    def run(m: Any, x: Tensor) -> Tensor:
        write(m)
        y: Tensor = m.fc(x)
        return y

    model = Runs(run, fc=nn.Linear(2, 2))
    model.register_buffer("n", torch.tensor(5.0))
    return model


def contents(model: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_buffers_hold_after_each_pass_what_they_held_before(
    write: Callable[[Any], object], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    model = counting(write)
    buffer = model.n
    with evaluating(model), mode():
        for _ in range(2):
            call(model, torch.ones(1, 2))
            assert contents(model) == {"n": 5}
            assert model.n is buffer


def test_buffers_made_in_inference_mode_are_put_back() -> None:
    with torch.inference_mode():
        model = counting()
    with evaluating(model), torch.inference_mode():
        call(model, torch.ones(1, 2))
    assert contents(model) == {"n": 5}


def test_tensors_in_attributes_hold_what_they_held_before() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.seen.add_(1)
        m.cache["x"].zero_()
        return x

    seen, cached = torch.zeros(2), torch.ones(2)
    model = Runs(run, seen=seen, cache={"x": cached}, weights=[nn.Parameter(torch.ones(1))])
    with evaluating(model):
        for _ in range(2):
            call(model, torch.ones(1))
            assert model.seen is seen
            assert not seen.any()
            assert cached.all()


def test_what_is_changed_between_passes_stays() -> None:
    model = counting()
    with evaluating(model):
        call(model, torch.ones(1, 2))
        model.n.add_(1)
        call(model, torch.ones(1, 2))
        model.n = torch.tensor([8.0, 9.0])
        call(model, torch.ones(1, 2))
    assert contents(model) == {"n": [8, 9]}


def test_modules_that_are_put_into_training_mode_learn() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    with evaluating(model):
        model[0].train()
        call(model, torch.randn(4, 2))
    assert int(model[0].num_batches_tracked) == 1
    assert int(model[1].num_batches_tracked) == 0


def test_a_backward_pass_reads_the_buffers_of_its_own_pass() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return x * m.n.add_(1)

    model = Runs(run)
    model.register_buffer("n", torch.tensor(5.0))
    x = torch.ones((), requires_grad=True)
    with evaluating(model, gradients=True):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(call(model, x), x)
            assert float(gradient) == 6
    assert contents(model) == {"n": 5}


def test_buffers_that_share_memory_or_have_no_numbers_do_no_harm() -> None:
    model = counting()
    model.register_buffer("view", model.n.view(1))
    model.register_buffer("wide", torch.zeros(1).expand(3))
    model.register_buffer("bare", torch.zeros(3, device="meta"))
    model.register_buffer("none", None)
    with evaluating(model):
        call(model, torch.ones(1, 2))
    assert float(model.n) == float(model.view) == 5


def test_a_single_pass_of_ones_own_is_as_a_call() -> None:
    model = counting()
    with evaluating(model), single_pass(model):
        model(torch.ones(1, 2))
    assert contents(model) == {"n": 5}


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_unchanged_by_passes_in_any_mode(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), counting()).train(training)
    model[1].register_forward_hook(lambda m, *_: setattr(m, "seen", 1))
    before = contents(model)
    with unchanged(model):
        model(torch.randn(4, 2))
        model(torch.randn(4, 2))
        assert float(model[1].n) == 7
    assert contents(model) == before
    assert not hasattr(model[1], "seen")


def test_a_model_is_unchanged_after_an_error() -> None:
    model = counting()
    with pytest.raises(RuntimeError, match="shapes"), unchanged(model):
        model(torch.ones(1, 3))
    assert contents(model) == {"n": 5}


def test_modes_alone() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    with same_modes(model):
        model.train()
    assert [module.training for module in model] == [True, False]


class Counts(nn.Module):
    """Counts its calls in a buffer, as models with a cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))
        self.register_buffer("calls", torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layers(x)
        return y


def test_no_step_of_a_squeeze_leaves_a_trace_in_buffers() -> None:
    model, x = Counts(), torch.randn(64, 4)
    before = contents(model)
    sites = sh.find_sites(model, x)
    assert contents(model) == before
    plan = sh.squeeze(model, sites, [x, x], target="macs:60%")
    assert contents(model) == before
    small = sh.apply(model, plan, x)
    assert contents(model) == before
    assert int(small.calls) == 5
    sh.measure(small, x, repeats=1, seconds=0)
    sh.compare({"dense": model, "small": small}, x, rounds=1)
    assert int(small.calls) == 5
    assert contents(model) == before
    simulated = sh.simulate(model, plan)
    assert int(simulated.calls) == 5
    simulated(x)
    assert contents(model) == before


class LooksUpOnce(nn.Module):
    """Keeps what it has looked up, until its weights move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.biases, self.last = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 2)
        self.known: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LooksUpOnce:
        self.known = {}
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if not self.known:
            self.known["x"] = self.biases[:, 1]
        return self.last(self.first(x) + self.known["x"])


def test_what_is_kept_computed_of_weights_is_computed_anew() -> None:
    model, x = LooksUpOnce().eval(), torch.randn(5, 4)
    with torch.no_grad():
        model(x)
    known = model.known
    site = sh.find_sites(model, x, kinds="hidden")["first"]
    assert "biases" in site.layers or any(slot.tensor == "biases" for slot in site.slots)
    assert model.known is known
    small = sh.apply(model, sh.Plan((sh.Entry.narrow(site, [0, 3, 5]),)), x)
    assert small(x).shape == (5, 2)
    compute_anew(model)
    assert model.known == {}
