"""Multiply-accumulates as they are counted during a pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shallower.recording.macs import mac_counter


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_counts_both_products(groups: int) -> None:
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 4 // groups, 7, 8), torch.randn(2, 4 // groups, 7, 8)
    with mac_counter() as counter:
        F.scaled_dot_product_attention(query, key, value, enable_gqa=groups > 1)
    assert counter.get_total_flops() // 2 == 2 * 4 * 5 * 7 * (8 + 8)


def test_a_linear_layer_and_a_convolution() -> None:
    with mac_counter() as counter, torch.no_grad():
        nn.Linear(6, 7)(torch.randn(3, 6))
        nn.Conv2d(2, 4, 3)(torch.randn(1, 2, 6, 6))
    assert counter.get_total_flops() // 2 == 3 * 6 * 7 + 16 * 9 * 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_count_every_step_and_direction(dtype: torch.dtype) -> None:
    layer = nn.LSTM(6, 3, num_layers=2, bidirectional=True, dtype=dtype)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    with mac_counter() as counter, torch.no_grad():
        layer(torch.randn(5, 2, 6, dtype=dtype))
    assert counter.get_total_flops() // 2 == 5 * 2 * weights


def test_experts_share_out_the_rows() -> None:
    with mac_counter() as counter, torch.no_grad():
        F.grouped_mm(torch.randn(10, 8), torch.randn(3, 8, 16), offs=torch.tensor([4, 4, 10], dtype=torch.int32))
    assert counter.get_total_flops() // 2 == 10 * 8 * 16
