"""Where a simulated model and one after surgery are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import SurgeryError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.sites import Place
from shallower.surgery.taps import Tap, taps_of


class Attention(nn.Module):
    """An MLP that makes the input of one packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.qkv, self.proj = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        made = self.qkv(F.relu(self.up(x))).reshape(b, t, 3, -1, 2)
        q, k, v = made.permute(2, 0, 3, 1, 4).unbind(0)
        z: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return z


def test_a_consumer_that_loses_heads_is_compared_at_the_rows_of_those_that_stay() -> None:
    model, x = Attention(), torch.randn(2, 5, 4)
    mlp, heads = find_sites(model, x, kinds=("hidden", "heads"))
    first, second = taps_of(steps([Entry.narrow(mlp, torch.arange(3)), Entry.narrow(heads, torch.tensor([1]))]))
    assert (first.name, second.name) == ("qkv", "proj")
    assert first.common is not None
    assert first.common.before.tolist() == [2, 3, 6, 7, 10, 11]
    assert first.common.after.tolist() == list(range(6))
    y = torch.arange(12.0).expand(1, 12)
    assert first.read(y, after=False).tolist() == [[2, 3, 6, 7, 10, 11]]
    assert second.common is None


def test_a_consumer_of_which_nothing_is_left_is_not_compared() -> None:
    model, x = nn.Sequential(*[m for _ in "123" for m in (nn.Linear(4, 4), nn.ReLU())]), torch.randn(2, 4)
    first, second = find_sites(model, x)
    todo = steps([Entry.narrow(first, torch.tensor([0])), Entry.collapse(second)])
    assert [tap.name for tap in taps_of(todo)] == ["4"]
    todo = steps([Entry.narrow(first, torch.tensor([0])), Entry.narrow(second, torch.tensor([1, 3]))])
    assert [tap.common and tap.common.before.tolist() for tap in taps_of(todo)] == [[1, 3], None]


def test_an_activation_place_is_compared_where_its_activation_was() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()), torch.randn(2, 4)
    places = [s for s in find_sites(model, x, kinds=("hidden", "activation")) if s.kind == "activation"]
    assert [tap.name for tap in taps_of(steps([Entry.collapse(place) for place in places]))] == ["2"]


def test_a_place_that_is_missing_is_an_error() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 4)
    with pytest.raises(SurgeryError, match="`9` is missing"):
        Tap(find_sites(model, x)[0], Place("9")).module_in(model)
