"""Layers are made ready to lose channels, and numbers fall with those that go, wherever they stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.modules.edits import Attribute, Dense, Number, edits, encoded, perform, replay
from shallower.modules.prepared.attention import DenseAttention
from shallower.modules.shrinking import before_cut, fallen
from shallower.modules.written import numbers_written
from shallower.sites import Follower, Written


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = 6
        self.register_buffer("held", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[:, : self.first], x[:, -3:], x.reshape(2, 3, 4)


SLICE = Written((("x[:, -3:]", 0),), 4, -3)
VIEW = Written((("x.reshape(2, 3, 4)", 0),), 1, 3)


def test_attributes_slices_from_the_end_and_sizes_fall_by_their_own_measure() -> None:
    followers = [Follower("", "first", 2), Follower("", "", 1, SLICE), Follower("", "", 0, VIEW)]
    edits = fallen(Parts(), followers, 3, 2)
    assert edits == [Attribute("", "first", 2), Number("", SLICE, -1), Number("", VIEW, 3)]


def test_a_number_that_fell_falls_on() -> None:
    model = Parts()
    for width in (3, 2):
        for edit in fallen(model, [Follower("", "", 1, SLICE)], width, 1):
            perform(model, edit)
    assert model(torch.arange(24).view(2, 12))[1].shape == (2, 1)


def test_a_number_that_counts_channels_within_others_falls_by_the_share_of_each() -> None:
    model = Parts()
    for follower, width, gone in ((Follower("", "first", 3), 2, 1), (Follower("", "first", 2), 3, 1)):
        for edit in fallen(model, [follower], width, gone):
            perform(model, edit)
    assert model.first == 2


def test_a_size_that_becomes_what_is_left_is_written_as_minus_one() -> None:
    rest = Written(VIEW.path, 2, -1)
    assert fallen(Parts(), [Follower("", "", 0, rest)], 6, 5) == [Number("", rest, -1)]


def test_attention_becomes_dense_before_one_of_its_tensors_is_cut() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)
    assert before_cut(model, ["layers.0.linear1.weight"]) == []
    made = before_cut(model, ["layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.bias"])
    assert made == [Dense("layers.0.self_attn")]
    perform(model, made[0])
    assert isinstance(model.layers[0].self_attn, DenseAttention)
    assert not model.use_nested_tensor
    assert before_cut(model, ["layers.0.self_attn.in_proj_weight"]) == []
    fresh = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)
    replay(fresh, [encoded(edit) for edit in edits(model)])
    assert isinstance(fresh.layers[0].self_attn, DenseAttention)
    assert not isinstance(fresh.layers[1].self_attn, DenseAttention)


def test_a_number_of_channels_within_others_falls_by_the_share_of_each() -> None:
    model = Parts()
    whole = Written(VIEW.path, 3, 12)
    for each, width, gone in ((4, 3, 1), (3, 4, 2)):
        for edit in fallen(model, [Follower("", "", each, whole)], width, gone):
            perform(model, edit)
    assert numbers_written(model) == {whole.path: {3: 4}}
    for each, width, gone in ((2, 3, 1), (3, 2, 1)):
        for edit in fallen(model, [Follower("", "first", each)], width, gone):
            perform(model, edit)
    assert model.first == 2
