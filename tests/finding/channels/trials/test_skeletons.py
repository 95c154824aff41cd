"""A copy for trials is whole again afterwards."""

from __future__ import annotations

import torch
from torch import nn

from shallower.finding.channels.trials.skeletons import Skeleton
from shallower.modules.edits import Attribute, Dense, Sized, edits, perform
from shallower.modules.offloading import weightless
from shallower.modules.prepared.lists import Entries


def test_whatever_edits_did_is_taken_back() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 4), "list": nn.ModuleList([nn.Linear(2, 3)] * 2)})
    skeleton = Skeleton(model, weightless(model.parameters()))
    with skeleton.lent() as trial:
        for edit in (
            Dense("attention"),
            Attribute("attention", "num_heads", 2),
            Sized("attention.out_proj", "weight", (8, 4)),
            Entries("list", (1,)),
        ):
            perform(trial, edit)
        trial.attention.out_proj.new = 3
        assert edits(trial)
    with skeleton.lent() as trial:
        assert repr(trial) == repr(model)
        assert trial.attention.out_proj.weight.shape == (8, 8)
        assert trial.attention.num_heads == 4
        assert not hasattr(trial.attention.out_proj, "new")
        assert not edits(trial)
        assert all(p.is_meta for p in trial.parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert torch.is_tensor(model["list"][0].weight)
