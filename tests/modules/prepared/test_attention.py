"""Attention whose heads and whose stream have widths of their own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.modules.prepared.attention import DenseAttention, count_attention_anew, is_stock, make_dense


def dense(layer: nn.MultiheadAttention) -> DenseAttention:
    """The same layer made dense."""
    made = copy.deepcopy(layer)
    make_dense(made)
    assert isinstance(made, DenseAttention)
    return made


def masks(batched: bool) -> list[Tensor | None]:
    """No mask, numbers for all, a causal one, one for each head."""
    each = torch.rand(6 if batched else 2, 5, 7) < 0.2
    return [None, torch.randn(5, 7, dtype=torch.float64), torch.ones(5, 7).triu(1).bool(), each]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False, "kdim": 6, "vdim": 3}, {"add_bias_kv": True, "add_zero_attn": True}],
)
def test_it_does_what_the_stock_layer_does(options: dict[str, Any], batched: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options).eval()
    sizes = ((5, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8)))
    given = []
    for steps, channels in sizes:
        x = torch.randn(3, steps, channels, dtype=torch.float64)
        if not batched:
            x = x[0]
        elif not layer.batch_first:
            x = x.transpose(0, 1)
        given.append(x)
    padding = torch.tensor([False] * 5 + [True] * 2)
    if batched:
        padding = padding.expand(3, -1)
    for mask, own, needed, average in itertools.product(masks(batched), (None, padding), (0, 1), (0, 1)):
        asked = {"attn_mask": mask, "key_padding_mask": own, "need_weights": bool(needed)}
        expected = layer(*given, average_attn_weights=bool(average), **asked)
        for one, two in zip(dense(layer)(*given, average_attn_weights=bool(average), **asked), expected, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two)


def test_a_causal_hint_is_taken() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)
    asked = {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False}
    torch.testing.assert_close(dense(layer)(x, x, x, **asked)[0], layer(x, x, x, **asked)[0])


def test_widths_are_independent() -> None:
    layer = dense(nn.MultiheadAttention(12, 4))
    layer.in_proj_weight = nn.Parameter(torch.randn(18, 10))
    layer.in_proj_bias = nn.Parameter(torch.randn(18))
    layer.out_proj.weight = nn.Parameter(torch.randn(10, 6))
    layer.out_proj.bias = nn.Parameter(torch.randn(10))
    count_attention_anew(layer)
    x = torch.randn(5, 2, 10)
    with pytest.raises(RuntimeError):
        layer(x, x, x)
    layer.num_heads = 2
    y, weights = layer(x, x, x)
    assert (y.shape, weights.shape) == (x.shape, (2, 5, 5))
    assert (layer.embed_dim, layer.kdim, layer.vdim, layer.head_dim) == (10, 10, 10, 3)


def test_dropout_is_that_of_training_only() -> None:
    layer, x = dense(nn.MultiheadAttention(8, 2, dropout=0.5)), torch.randn(5, 2, 8)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_only_the_class_itself_is_stock() -> None:
    class Own(nn.MultiheadAttention):
        """With a forward of its own, perhaps."""

    layer = nn.MultiheadAttention(8, 2)
    assert is_stock(layer)
    assert not is_stock(Own(8, 2))
    assert not is_stock(dense(layer))


def test_it_is_exported() -> None:
    layer, x = dense(nn.MultiheadAttention(8, 2, batch_first=True)).eval(), torch.randn(2, 5, 8)
    exported = torch.export.export(layer, (x, x, x)).module()
    torch.testing.assert_close(exported(x, x, x)[0], layer(x, x, x)[0])
