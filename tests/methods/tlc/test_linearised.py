"""An activation, or the line in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.methods.tlc.linearised import Linearised


@pytest.mark.parametrize("channels_first", [False, True])
def test_the_line_takes_the_place_of_the_activation_and_gives_it_back(channels_first: bool) -> None:
    h = torch.randn(2, 3, 5, 4)
    width = h.shape[1 if channels_first else -1]
    slope, offset = torch.randn(width), torch.randn(width)
    module = Linearised(nn.ReLU(), width, gated=False, channels_first=channels_first)
    assert torch.equal(module(h), torch.relu(h))
    module.set(slope, offset)
    if channels_first:
        slope, offset = slope[:, None, None], offset[:, None, None]
    torch.testing.assert_close(module(h), slope * h + offset)
    module.unset()
    assert torch.equal(module(h), torch.relu(h))


def test_a_gate_becomes_a_constant() -> None:
    module = Linearised(nn.SiLU(), 4, gated=True, channels_first=False)
    module.set(torch.arange(4.0), torch.zeros(4))
    assert torch.equal(module(torch.randn(2, 4)), torch.arange(4.0).expand(2, 4))


def test_an_activation_without_channels_becomes_the_identity() -> None:
    module = Linearised(nn.ReLU(), None, gated=False, channels_first=False)
    module.set(torch.ones(1), torch.zeros(1))
    h = torch.randn(3, 5)
    assert module(h) is h


def test_the_state_says_which_of_the_two_it_is() -> None:
    module = Linearised(nn.ReLU(), 4, gated=False, channels_first=False)
    module.set(torch.full((4,), 0.5), torch.zeros(4))
    other = Linearised(nn.ReLU(), 4, gated=False, channels_first=False)
    other.load_state_dict(module.state_dict())
    h = torch.randn(2, 4)
    assert other.is_linear
    torch.testing.assert_close(other(h), 0.5 * h)
