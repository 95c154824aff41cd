"""Running statistics around passes at other widths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from shallower.methods.dropout.norms import frozen_statistics, restored_statistics, with_statistics


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_frozen_norm_normalises_by_its_batch_and_keeps_its_statistics(
    kind: type[nn.Module], momentum: float | None
) -> None:
    if kind is nn.InstanceNorm1d and momentum is None:
        pytest.skip("an InstanceNorm has no cumulative mean")
    norm = kind(3, momentum=momentum, track_running_stats=True).train()
    x = torch.randn(8, 3, 5)
    norm(x)
    before, expected = copy.deepcopy(norm.state_dict()), norm(x).detach()
    norm.load_state_dict(before)
    with frozen_statistics(norm):
        found = norm(x)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)
    assert norm.momentum == momentum
    assert norm.track_running_stats


def test_statistics_come_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    assert with_statistics(model) == [model[0]]
    before = copy.deepcopy(model[0].state_dict())
    with restored_statistics(model):
        model(torch.randn(4, 3))
    with pytest.raises(RuntimeError), restored_statistics(model):
        model(torch.randn(4, 7))
    torch.testing.assert_close(dict(model[0].state_dict()), dict(before), rtol=0, atol=0)
