"""The KV cache: its bytes for each token, whatever holds the keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shallower.recording.caches import kv_of
from shallower.recording.tracing import trace_forward


def test_keys_and_values_of_every_layer_count_for_each_token() -> None:
    keys, values = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 6)
    legacy = SimpleNamespace(past_key_values=((keys, values), (keys, values)))
    layers = SimpleNamespace(layers=[SimpleNamespace(keys=keys.half(), values=values.half())])
    assert kv_of(legacy) == 2 * 2 * (4 + 6) * 4
    assert kv_of(SimpleNamespace(past_key_values=layers)) == 2 * (4 + 6) * 2


def test_what_is_no_cache_has_no_bytes() -> None:
    assert kv_of(torch.zeros(2)) is None
    assert kv_of(SimpleNamespace(past_key_values=None)) is None
    assert trace_forward(nn.Linear(2, 2), torch.zeros(1, 2)).kv is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_trace_counts_the_cache_that_the_model_returns(device: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaModel(config)
    assert trace_forward(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}).kv == 3 * 2 * 2 * 4 * 4
