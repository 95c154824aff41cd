"""Numbers fall with the channels that go, wherever they stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.modules.edits import Attribute, Number, perform
from shallower.modules.numbers import fallen
from shallower.sites import Follower, Written


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = 6

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[:, : self.first], x[:, -3:], x.reshape(2, 3, 4)


SLICE = Written((("x[:, -3:]", 0),), 4, -3)
VIEW = Written((("x.reshape(2, 3, 4)", 0),), 1, 3)


def test_attributes_slices_from_the_end_and_sizes_fall_by_their_own_measure() -> None:
    followers = [Follower("", "first", 2), Follower("", "", 1, SLICE), Follower("", "", 0, VIEW)]
    edits = fallen(Parts(), followers, 2)
    assert edits == [Attribute("", "first", 2), Number("", SLICE, -1), Number("", VIEW, 3)]


def test_a_number_that_fell_falls_on() -> None:
    model = Parts()
    for _ in range(2):
        for edit in fallen(model, [Follower("", "", 1, SLICE)], 1):
            perform(model, edit)
    assert model(torch.arange(24).view(2, 12))[1].shape == (2, 1)


def test_a_size_that_becomes_what_is_left_is_written_as_minus_one() -> None:
    rest = Written(VIEW.path, 2, -1)
    assert fallen(Parts(), [Follower("", "", 0, rest)], 5) == [Number("", rest, -1)]
