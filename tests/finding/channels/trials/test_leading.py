"""A led pass shows everything that does not follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run
from shallower.finding.channels.trials.leading import Expected, Led
from shallower.recording.tracing import trace_forward


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(-1, 6)
        h = torch.cat((h, torch.zeros(len(h), 6)), 0) / h.shape[-1]
        y: Tensor = self.b(h)
        return y


def led(width: int, model: nn.Module) -> Led:
    whole = Net()
    f = Following(trace_forward(whole, torch.randn(2, 3)))
    (run,) = [axis for axis in f.axes(f.trace.weights[whole.a, "weight"])[:1] if isinstance(axis, Run)]
    found = Led(Expected(f), {run: width})
    found.run(model, torch.randn(2, 3))
    return found


def test_all_sizes_and_numbers_that_do_not_follow_are_shown_in_one_pass() -> None:
    found = led(4, Net(4))
    assert sorted(wrong.size.given for wrong in found.wrong.values()) == [6, 6]
    assert found.blamed == {4}  # nobody knows what else than the width is in the number that it divides by
    assert found.ended is None


def test_nothing_is_shown_where_nothing_is_cut() -> None:
    assert led(6, Net()).is_clean


def test_a_result_of_another_shape_is_the_fault_of_its_call() -> None:
    model = Net(4)
    model.b = nn.Linear(5, 2)
    assert led(4, model).blamed == {4, 5}


def test_a_forward_that_makes_other_calls_ends_the_pass() -> None:
    model = Net(4)
    model.a = nn.Sequential(nn.Linear(3, 4), nn.ReLU())  # type: ignore[assignment]
    assert led(4, model).ended == 1


def test_numbers_of_a_check_do_not_count() -> None:
    class Checked(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if not bool(torch.tensor(len(x)) * h.shape[-1] == h.numel()):
                raise ValueError
            y: Tensor = self.b(h)
            return y

    f = Following(trace_forward(Checked(), torch.randn(2, 3)))
    (run,) = [axis for axis in f.axes(f.trace.weights[f.trace.model.a, "weight"])[:1] if isinstance(axis, Run)]
    found = Led(Expected(f), {run: 4})
    found.run(Checked(4), torch.randn(2, 3))
    assert found.is_clean
