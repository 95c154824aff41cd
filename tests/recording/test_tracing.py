"""One recorded forward pass: names, versions of tensors, frames, and what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallower.recording.tracing import Trace, trace_forward


class Runs(nn.Module):
    """A model whose forward is given."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = forward

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def trace(forward: Any, *args: Any, **modules: nn.Module) -> Trace:
    return trace_forward(Runs(forward, **modules), args or (torch.randn(3, 4),))


def names(recorded: Trace) -> list[str]:
    return [call.name for call in recorded.calls if call.outputs]


SAME: list[tuple[str, list[Any]]] = [
    ("relu", [F.relu, torch.relu, torch.Tensor.relu, torch.relu_, lambda x: F.relu(x, inplace=True)]),
    ("mul", [lambda x: x * 2, lambda x: 2 * x, torch.Tensor.mul, torch.multiply, torch.Tensor.mul_]),
    ("div", [lambda x: x / 2, lambda x: 2 / x, torch.true_divide, torch.div]),
    ("sub", [lambda x: x - 1, lambda x: 1 - x, torch.sub]),
    ("add", [lambda x: x + 1, lambda x: 1 + x, torch.add]),
    ("pow", [lambda x: x**2, lambda x: 2**x, torch.pow]),
    ("gelu", [F.gelu, nn.GELU()]),
    ("sigmoid", [F.sigmoid, torch.sigmoid, torch.Tensor.sigmoid]),
]


@pytest.mark.parametrize(("name", "functions"), SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_a_function_has_one_name_however_it_is_called(name: str, functions: list[Any]) -> None:
    for f in functions:
        takes_two = f in (torch.Tensor.mul, torch.Tensor.mul_, torch.multiply, torch.true_divide, torch.div)
        takes_two = takes_two or f in (torch.sub, torch.add, torch.pow)
        recorded = trace(lambda _, x, f=f, two=takes_two: f(x, 2.0) if two else f(x))
        assert names(recorded) == [name]


def test_looking_at_a_tensors_form_is_not_reading_it() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        assert x.shape[0] == x.size(0) == len(x) == 3
        assert x.dim() == 2
        assert x.dtype == torch.float32
        assert x.device.type == "cpu"
        return x + 1

    recorded = trace(forward)
    assert [call.name for call in recorded.calls] == ["add"]


def test_reading_a_value_into_python_is_reading_the_tensor() -> None:
    recorded = trace(lambda _, x: x + float(x[0, 0]))
    assert "float" in [call.name for call in recorded.calls]


def test_an_in_place_call_makes_a_new_version_with_its_own_readers() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        h = x + 1
        h.relu_()
        return h * 2

    recorded = trace(forward)
    add, relu, mul = recorded.calls
    assert relu.inplace
    assert add.outputs[0].readers == [relu]
    assert mul.inputs == relu.outputs


def test_a_call_that_hands_back_its_argument_still_makes_a_step() -> None:
    recorded = trace(lambda _, x: F.dropout(x + 1, 0.5, False) * 2)
    add, dropout, mul = recorded.calls
    assert dropout.inputs == add.outputs
    assert mul.inputs == dropout.outputs


def test_writing_through_a_view_marks_the_tensor_under_it() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        h = x + 1
        h[:, 0].zero_()
        return h * 2

    recorded = trace(forward)
    assert recorded.calls[0].outputs[0].clobbered


def test_frames_follow_the_modules_and_ordinals_count_in_each() -> None:
    act = nn.ReLU()
    recorded = trace(lambda m, x: m.block(m.act(m.act(x))), act=act, block=nn.Sequential(act, nn.Tanh()))
    assert [frame.name for frame in recorded.frames] == ["", "act", "act", "block", "act", "block.1"]
    assert [frame.ordinal for frame in recorded.frames] == [0, 0, 1, 0, 0, 0]
    assert names(recorded) == ["relu", "relu", "relu", "tanh"]


def test_modules_made_on_the_fly_are_seen_through() -> None:
    recorded = trace(lambda _, x: nn.ReLU()(x))
    assert [frame.name for frame in recorded.frames] == [""]
    assert recorded.calls[0].frame is recorded.root


def test_where_tensors_come_from_is_known() -> None:
    outside = torch.ones(4)
    recorded = trace(lambda m, x: x * m.weight + outside)
    mul, add = recorded.calls
    assert [value.origin for value in mul.inputs] == ["input", "parameter"]
    assert mul.inputs[1].name == "weight"
    assert [value.origin for value in add.inputs] == ["computed", "unknown"]


def test_what_depends_on_the_inputs_is_fed() -> None:
    recorded = trace(lambda m, x: (m.weight * 2) + (torch.ones(4) + 1) + x)
    flags = {call.name: [value.fed for value in call.inputs] for call in recorded.calls}
    assert flags["mul"] == [False]
    assert recorded.calls[-1].outputs[0].fed


def test_outputs_in_any_nesting_are_marked() -> None:
    recorded = trace(lambda _, x: {"a": [x + 1], "b": (x * 2, None)})
    assert [call.outputs[0].output for call in recorded.calls] == [True, True]


def test_macs_are_those_of_the_products() -> None:
    recorded = trace(lambda m, x: m.fc(x), fc=nn.Linear(4, 5))
    assert recorded.macs == 3 * 4 * 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_calls_that_no_function_shows_are_recorded_too() -> None:
    scripted = torch.jit.trace(lambda x: torch.relu(x), torch.randn(3, 4))
    recorded = trace(lambda _, x: scripted(x + 1) * 2)
    assert any(call.name == "relu" for call in recorded.calls)
    assert recorded.calls[0].outputs[0].readers


def test_attributes_and_hooks_that_a_forward_sets_are_taken_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.seen = x
        m.fc.register_forward_hook(lambda *_: None)
        return m.fc(x)  # type: ignore[no-any-return]

    model = Runs(forward, fc=nn.Linear(4, 4))
    trace_forward(model, torch.randn(3, 4))
    assert not hasattr(model, "seen")
    assert not model.fc._forward_hooks


def test_a_model_without_data_runs_on_the_values_of_its_inputs() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        assert bool(mask.all())
        assert torch.ones(2, device=x.device).sum().item() == 2
        return m.fc(x) if mask.sum() == 3 else x  # type: ignore[no-any-return]

    model = Runs(forward, fc=nn.Linear(4, 4)).to("meta")
    recorded = trace_forward(model, (torch.randn(3, 4), torch.ones(3)))
    assert "linear" in names(recorded)
    assert model.fc.weight.is_meta
    assert "linear" in names(trace_forward(model, (torch.randn(3, 4, device="meta"), torch.ones(3, device="meta"))))
