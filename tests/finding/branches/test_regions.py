"""What of a pass runs for one value only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.finding.branches.regions import Regions, origin
from shallower.recording.tracing import trace_forward


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.first(x).to(x.dtype)
        return shared + self.third(self.second(shared).relu())


def test_a_region_ends_at_what_others_read() -> None:
    trace = trace_forward(Forked(), torch.randn(2, 4))
    (add,) = [call for call in trace.calls if call.name == "add"]
    region = Regions(trace).behind(add.inputs[1], add)
    assert [frame.name for frame in region.frames] == ["second", "third"]
    assert [call.name for call in region.loose] == ["relu"]
    assert region.macs == 2 * 2 * 16


def test_nothing_runs_for_a_value_alone_that_others_read() -> None:
    trace = trace_forward(Forked(), torch.randn(2, 4))
    (add,) = [call for call in trace.calls if call.name == "add"]
    assert not Regions(trace).behind(add.inputs[0], add).calls


def test_a_conversion_to_the_same_type_hands_on_its_value() -> None:
    trace = trace_forward(Forked(), torch.randn(2, 4))
    (handed,) = [call for call in trace.calls if call.name == "to"]
    assert origin(handed.outputs[0]) is handed.inputs[0]
