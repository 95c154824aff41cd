"""Layers made ready to lose channels."""

from __future__ import annotations

from torch import nn

from shallower.modules.edits import Dense, edits, encoded, perform, replay
from shallower.modules.prepared.attention import DenseAttention
from shallower.modules.preparing import ready_for_cuts


def test_attention_becomes_dense_before_one_of_its_tensors_is_cut() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)
    assert ready_for_cuts(model, ["layers.0.linear1.weight"]) == []
    made = ready_for_cuts(model, ["layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.bias"])
    assert made == [Dense("layers.0.self_attn")]
    perform(model, made[0])
    assert isinstance(model.layers[0].self_attn, DenseAttention)
    assert not model.use_nested_tensor
    assert ready_for_cuts(model, ["layers.0.self_attn.in_proj_weight"]) == []
    fresh = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)
    replay(fresh, [encoded(edit) for edit in edits(model)])
    assert isinstance(fresh.layers[0].self_attn, DenseAttention)
    assert not isinstance(fresh.layers[1].self_attn, DenseAttention)
