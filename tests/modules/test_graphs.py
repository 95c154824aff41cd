"""A module's own forward is seen as graphs, and what they leave out is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import Refusal
from shallower.modules.graphs import Forwards, forwards_of, names_loaded, steps_of, tensor_steps
from shallower.modules.rewriting import externalise
from shallower.recording.tracing import Frame, trace_forward
from shallower.sites import Place


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, flip: bool = False) -> Tensor:
        x = F.relu(self.fc(x)) * x.shape[0]
        x = F.dropout(F.relu(x), training=self.training)
        return -x if flip else x * scale


def forwards(module: nn.Module) -> Forwards:
    found = forwards_of(module)
    assert isinstance(found, Forwards)
    return found


def frame_of(model: nn.Module, inputs: object) -> Frame:
    return trace_forward(model, inputs).root  # type: ignore[arg-type]


def test_steps_are_operations_on_tensors_in_order() -> None:
    names = [name for name, _ in tensor_steps(forwards(Net()).graphs[1])]
    assert names == ["self.fc", "relu", "mul", "relu", "dropout", "mul"]
    assert steps_of(frame_of(Net(), torch.ones(2, 3))) == names


def test_an_argument_that_is_only_passed_on_is_free_and_one_that_branches_is_held() -> None:
    found = forwards(Net())
    assert [held.name for held in found.held] == ["flip"]
    assert found.problem_of(frame_of(Net(), {"x": torch.ones(2, 3), "scale": 2.0})) == ""
    frame = frame_of(Net(), torch.ones(2, 3))
    frame.kwargs = {"flip": True}
    assert "branches on its argument flip" in found.problem_of(frame)


def test_calls_that_became_children_are_expected_as_children() -> None:
    model = Net()
    found = forwards(model)
    externalise(model, Place("", (("relu", 0),)))
    assert found.steps_in(model) == ["self.fc", "self.relu_0", "mul", "relu", "dropout", "mul"]
    assert found.problem_of(frame_of(model, torch.ones(2, 3))) == ""


def test_what_cannot_be_followed_is_refused_with_the_reason() -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 0:
                x = x - 1
            return x

    refusal = forwards_of(Loops())
    assert isinstance(refusal, Refusal)
    assert "the forward of Loops cannot be traced" in refusal.reason


def test_what_a_forward_writes_into_its_buffers_is_in_the_graphs_and_was_not_written() -> None:
    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.n += 1
            self.seen.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return F.relu(self.fc(x)) / self.n

    module = Counting()
    module.register_buffer("n", torch.zeros(1))
    module.register_buffer("seen", torch.zeros(3))
    names = [name for name, _ in tensor_steps(forwards(module).graphs[1])]
    assert names == ["add", "mul", "mean", "add", "self.fc", "relu", "div"]
    assert module.n == 0
    assert not module.seen.any()
    assert steps_of(frame_of(module, torch.ones(2, 3))) == names


def test_a_forward_that_puts_another_tensor_in_the_place_of_a_buffer_is_refused() -> None:
    class Replacing(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.n = self.n + 1
            return F.relu(self.fc(x))

    module = Replacing()
    module.register_buffer("n", torch.zeros(1))
    refusal = forwards_of(module)
    assert isinstance(refusal, Refusal)
    assert "sets attributes or makes tensors of its own (n)" in str(refusal)
    assert module.n == 0


def test_names_are_counted_each_time_that_they_are_loaded() -> None:
    def function(x: int, y: int) -> int:
        return x * y + x * abs(y)

    names = names_loaded(function)
    assert (names.count("x"), names.count("y"), names.count("abs")) == (2, 2, 1)
