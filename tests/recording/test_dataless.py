"""Inputs keep their values beside weights that have none."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shallower.recording.dataless import placed


def test_inputs_stay_as_they_are_beside_weights_with_data() -> None:
    x = torch.randn(2, 3)
    with placed(nn.Linear(3, 2), x) as inputs:
        assert inputs is x


def test_what_reads_a_weight_without_data_has_none_and_all_else_has() -> None:
    layer = nn.Linear(3, 2, device="meta")
    with placed(layer, torch.ones(4, 3)) as inputs:
        assert float(inputs.sum()) == 12
        assert layer(inputs).is_meta
        assert not torch.zeros(1, device="meta").is_meta


def test_fake_weights_are_themselves_again_afterwards() -> None:
    with FakeTensorMode():
        layer = nn.Linear(3, 2)
    weight = layer.weight
    with placed(layer, torch.ones(4, 3)) as inputs:
        assert layer(inputs).shape == (4, 2)
    assert layer.weight is weight
