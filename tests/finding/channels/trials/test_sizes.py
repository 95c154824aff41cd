"""Which numbers of a call are sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.trials.sizes import sizes_of
from shallower.recording.tracing import trace_forward

CALLS: list[tuple[Callable[[Tensor], object], list[tuple[int, int]]]] = [
    (lambda h: h.view(2, 2, 4), [(1, 2), (2, 2), (3, 4)]),
    (lambda h: h.reshape((2, -1)), [(1, 2)]),
    (lambda h: h.split([3, 5], -1), [(1, 3), (2, 5)]),
    (lambda h: h.tensor_split([3], -1), [(1, 3)]),
    (lambda h: h.split(4, -1), [(1, 4)]),
    (lambda h: h[:, 2:6], [(4, 2), (5, 6)]),
    (lambda h: h[..., :-3], [(3, -3)]),
    (lambda h: h.narrow(1, 2, 4), [(3, 4), (2, 2)]),
    (lambda h: h.unflatten(-1, (2, 4)), [(2, 2), (3, 4)]),
    (lambda h: h[:, None].expand(2, 3, 8), [(1, 2), (2, 3), (3, 8)]),
    (lambda h: h[:, None].repeat(1, 3, 1), [(2, 3)]),
    (lambda h: h.new_zeros(2, 8), [(1, 2), (2, 8)]),
    (lambda h: F.pad(h, (1, 2)), [(1, 1), (2, 2)]),
    (lambda h: F.layer_norm(h, (8,)), [(1, 8)]),
    (lambda h: F.group_norm(h, 4), [(1, 4)]),
    (lambda h: h.softmax(-1), []),
]


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_sizes_stand_at_their_places(call: Callable[[Tensor], object], expected: list[tuple[int, int]]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> object:
            return call(self.a(x))

    f = Following(trace_forward(Net(), torch.randn(2, 3)), returned="")
    assert [(size.place, size.given) for size in sizes_of(f, f.trace.calls[-1])] == expected
