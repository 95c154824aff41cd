"""What stands in the place of a branch that is gone."""

from __future__ import annotations

import torch
from torch import nn

from shallower.modules.edits import edits, perform, replay
from shallower.modules.prepared.absent import Absent, PassedOn, Zeros


def test_zeros_have_the_sizes_that_the_module_gave() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert torch.equal(Zeros()(mask=None, hidden=x), torch.zeros_like(x))
    for stride in (1, 2, 3):
        conv = nn.Conv2d(3, 4, 3, stride=stride, padding=1)
        assert Zeros(channels=4, stride=stride)(x).shape == conv(x.float()).shape
    zeros, *others = Zeros(returns=3)(x)
    assert others == [None, None]
    assert not zeros.any()


def test_a_layer_passes_on_what_it_reads() -> None:
    x = torch.randn(2, 3)
    assert PassedOn()(x) is x
    assert PassedOn(returns=2)(hidden=x) == (x, None)


def test_the_edit_is_recorded_and_replayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    perform(model, Absent("0", channels=2, stride=2))
    perform(model, Absent("1", passes=True))
    fresh = replay(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), edits(model))
    assert (fresh[0].channels, fresh[0].stride) == (2, 2)
    assert isinstance(fresh[1], PassedOn)
    assert not model[0].training
