"""Multiply-accumulates of the calls of one forward pass."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def mac_counter() -> FlopCounterMode:
    """A `FlopCounterMode` that also knows the CPU's kernels for attention and LSTMs, and products by experts.

    Its total is twice the MACs. It counts the model as a whole: the stock counter's bookkeeping by module puts gradient
    hooks on what modules are given, which fails where that is a parameter and gradients are off (DeBERTa).
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {kernel: _attention_flops, torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops}
    if hasattr(torch.ops.aten, "_grouped_mm"):
        known[torch.ops.aten._grouped_mm] = _grouped_flops
    counter = FlopCounterMode(display=False, custom_mapping=known)
    vars(counter)["mod_tracker"] = _WholeModel()
    return counter


class _WholeModel:
    """Stands in for the counter's tracker of modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of softmax(Q K^T) V from the shapes (batch, heads, length, channels); keys and values may have fewer heads."""
    batch, heads, queries, channels = query
    return int(2 * batch * heads * queries * key[2] * (channels + value[3]))


def _recurrent_flops(steps: Any, inputs: Any, states: Any, *_: Any, **__: Any) -> int:
    """Of one direction of a recurrent layer from the shapes (steps, batch, channels) and of two weights."""
    return int(2 * steps[0] * steps[1] * (prod(inputs) + prod(states)))


def _grouped_flops(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """Of rows (all, in) that the matrices (experts, in, out) share out, or of as many stacks of rows as matrices."""
    return int(2 * prod(rows) * matrices[-1])
