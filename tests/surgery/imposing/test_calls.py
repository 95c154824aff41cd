"""Dropped channels are never chosen in a simulated model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.sites import Choice, Site, Slot, Span
from shallower.surgery.imposing.calls import limit_calls


class Router(nn.Module):
    """The largest of some scores, then their shares."""

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if scores.isnan().any():
            raise ValueError("no scores")
        return scores.topk(2)[1], scores.softmax(-1)


def entry(function: str, ordinal: int = 0) -> sh.Entry:
    """The first and the third of four are kept where a function chooses."""
    span = (Span(0, 1, 0, 1),)
    site = Site(
        "site", "experts", 4, None, (), None, slots=(Slot("weight", (4, 2), 0, span, "rows"),),
        choices=(Choice("router", function, ordinal, -1, 4, span),),
    )  # fmt: skip
    return sh.Entry.narrow(site, [0, 2])


def test_only_what_is_kept_is_chosen() -> None:
    model = nn.ModuleDict({"router": Router()})
    limit_calls(model, [entry("topk"), entry("softmax")])
    chosen, shares = model["router"](torch.tensor([[1.0, 9.0, 2.0, 8.0]]))
    assert chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(shares[0, [0, 2]], torch.tensor([1.0, 2.0]).softmax(-1))
    assert shares[0, [1, 3]].tolist() == [0, 0]


def test_other_calls_choose_freely() -> None:
    model = nn.ModuleDict({"router": Router()})
    limit_calls(model, [entry("topk", ordinal=1)])
    assert model["router"](torch.tensor([[1.0, 9.0, 2.0, 8.0]]))[0].tolist() == [[1, 3]]


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = nn.ModuleDict({"router": Router()})
    limit_calls(model, [entry("topk")])
    with pytest.raises(ValueError, match="no scores"):
        model["router"](torch.tensor([[torch.nan, 1.0, 2.0, 3.0]]))
    assert torch.tensor([1.0, 9.0, 2.0, 8.0]).topk(2)[1].tolist() == [1, 3]
    again = copy.deepcopy(model)
    assert again["router"](torch.tensor([[1.0, 9.0, 2.0, 8.0]]))[0].tolist() == [[2, 0]]
