"""What a model that decodes keeps of each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from shallower.core.trees import tensors


def kv_of(output: Any) -> int | None:
    """Bytes for each token of the KV cache that a forward pass returns; None where it returns none."""
    total = 0
    for tensor in cached(output):
        total += tensor.numel() * tensor.element_size() // (tensor.shape[0] * tensor.shape[2])
    return total or None


def cached(output: Any) -> Iterator[Tensor]:
    """Keys and values of the KV cache that a forward pass returns, each (batch, heads, tokens, channels)."""
    cache = getattr(output, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", cache)
    if not isinstance(layers, Iterable):
        return
    for layer in layers:
        for tensor in _keys_and_values(layer):
            if tensor.dim() == 4 and tensor.numel():
                yield tensor


def _keys_and_values(layer: Any) -> Iterator[Tensor]:
    """Those of one layer of a cache: attributes of Transformers' layers, or a tuple of tensors."""
    yield from tensors([getattr(layer, "keys", None), getattr(layer, "values", None)])
    if isinstance(layer, (tuple, list)):
        yield from tensors(layer[:2])
