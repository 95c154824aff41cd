"""What a model costs, counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import ModelError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_as_found, cost_of, count_macs, count_params, peak_memory, size_of
from shallower.measuring.measurement import measure


def network(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Attention(nn.Module):
    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:
        queries = x.view(3, 5, 2, 4).transpose(1, 2)
        keys = queries[:, : self.kv_heads]
        return nn.functional.scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)


def test_tied_weights_count_once():
    assert count_params(Tied()) == 40


def test_attention_counts_on_the_cpu_as_on_the_meta_device():
    x = torch.randn(3, 5, 8)
    assert count_macs(Attention(), x) == count_macs(Attention(), x.to("meta")) == 2 * 3 * 2 * 5 * 5 * 4


def test_attention_with_shared_keys_counts_every_query_head():
    assert count_macs(Attention(kv_heads=1), torch.randn(3, 5, 8)) == 2 * 3 * 2 * 5 * 5 * 4


def test_the_fused_transformer_encoder_counts_as_its_parts():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(3, 5, 8)
    assert count_macs(encoder.eval(), x) == count_macs(encoder.train(), x) > 0


def test_peak_memory_is_the_weights_the_inputs_and_the_largest_live_activations():
    x = torch.randn(2, 8)
    weights = 4 * count_params(network())
    assert peak_memory(network(), x) == weights + x.nbytes + 2 * (2 * 32 * 4)


def test_peak_memory_releases_what_is_no_longer_alive():
    deep = nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)])
    x = torch.randn(64, 16)
    assert peak_memory(deep, x) == 4 * count_params(deep) + 3 * x.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda_holds_the_weights_and_activations():
    model, x = network(1024).cuda(), torch.randn(512, 8, device="cuda")
    least = 4 * count_params(model) + x.nbytes + 2 * 512 * 1024 * 4
    assert least <= peak_memory(model, x) < 2 * least + (32 << 20)
    assert "cuda" in measure(model, x, repeats=3, seconds=0).device


def test_a_model_that_does_not_run_on_the_inputs_is_one_sentence():
    with pytest.raises(ModelError, match="Sequential does not run on the example inputs"):
        cost_of(network(), torch.randn(2, 99))


def test_bytes_are_those_of_parameters_and_buffers_in_their_types():
    model = nn.Sequential(nn.Conv2d(2, 3, 1).bfloat16(), nn.BatchNorm2d(3))
    assert size_of(model) == 2 * (6 + 3) + 4 * 4 * 3 + 8


def test_a_model_costs_what_it_cost_when_its_sites_were_found():
    model, x = network(), torch.randn(2, 8)
    assert cost_as_found(model, find_sites(model, x)) == cost_of(model, x)


def test_a_model_without_a_cache_has_no_kv():
    assert cost_of(network(), torch.randn(2, 8)).kv is None
