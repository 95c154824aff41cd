"""Numbers of channels: carried where they are moved, and closing their channels where they are computed with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.recording.tracing import trace_forward


class Picks(nn.Module):
    """Picks rows of a table by what becomes of the numbers of the largest scores."""

    def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.moved, self.router, self.table = moved, nn.Linear(5, 4), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.moved(self.router(x).topk(2)[1])]


def reasons(moved: Callable[[Tensor], Tensor]) -> tuple[str, bool]:
    """Why the rows of the table stay, and whether they go with those of the router."""
    model = Picks(moved)
    f = Following(trace_forward(model, torch.randn(6, 5)))
    table = f.axes(f.trace.weights[model, "table"])[0]
    rows = f.axes(f.trace.weights[model.router, "weight"])[0]
    return getattr(table, "closed", ""), table is rows


@pytest.mark.parametrize(
    "moved",
    [
        lambda i: i,
        lambda i: i.flatten().to(torch.int32).long(),
        lambda i: i.sort(-1)[0],
        lambda i: i[..., :1].expand(-1, 3),
        lambda i: i.unbind(-1)[1],
    ],
)
def test_numbers_that_are_moved_name_the_same_channels(moved: Callable[[Tensor], Tensor]) -> None:
    assert reasons(moved) == ("", True)


@pytest.mark.parametrize(
    "moved",
    [
        lambda i: i % 2,
        lambda i: (i + 1) % 4,
        lambda i: torch.where(i > 1, i, 0),
        lambda i: torch.tensor(i.tolist()),
        lambda i: i.max(-1)[0],
    ],
)
def test_numbers_that_are_computed_with_close_their_channels(moved: Callable[[Tensor], Tensor]) -> None:
    reason, _ = reasons(moved)
    assert reason


def test_numbers_of_one_kind_side_by_side() -> None:
    assert reasons(lambda i: torch.cat([i[:, :1], i[:, 1:]], -1)) == ("", True)
