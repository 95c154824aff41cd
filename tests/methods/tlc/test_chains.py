"""A site's layers taken out of their model answer as they do in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.finding.kinds import find_sites
from shallower.methods.tlc.chains import Chain


class Block(nn.Module):
    """Two convolutions with norms around the activation and a skip around both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class Reshaped(nn.Module):
    """A reshape between two linear layers that a chain does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("trained", [False, True])
def test_a_block_with_its_norms_and_its_skip(trained: bool) -> None:
    torch.manual_seed(0)
    model = Block().train()
    if trained:
        model(torch.randn(16, 4, 6, 6))
    model.eval()
    x = torch.randn(2, 4, 6, 6)
    chain = Chain(model, list(find_sites(model, x)))
    torch.testing.assert_close(chain(x), model(x))


def test_overlapping_sites_are_one_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 2)).eval()
    x = torch.randn(3, 4)
    sites = list(find_sites(model, x))
    assert len(sites) == 2
    torch.testing.assert_close(Chain(model, sites)(x), model(x))


def test_a_chain_says_whether_it_runs() -> None:
    model = Reshaped().eval()
    sites = list(find_sites(model, torch.randn(2, 4)))
    assert Chain(model, sites).runs_on(torch.randn(2, 4))
    assert not Chain(model, sites).runs_on(torch.randn(2, 5))
