"""Attention as one operation."""

from __future__ import annotations

from typing import Any

from shallower.finding.channels.following import Axes, Following, rule
from shallower.finding.channels.layout import close, fixed, mark, tie, within
from shallower.recording.tracing import Call, Value

FEATURES = "the features of a head stay; heads can be cut"


@rule("scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale enable_gqa")
def attention(
    f: Following, call: Call, query: Value, key: Value, value: Value, mask: Any, _p: Any, _c: Any, _s: Any, shared: Any
) -> Axes:
    """softmax(q k^T) v over (..., heads, positions, features)."""
    *batch, positions, features = f.axes(query)
    *others, keys, key_features = f.axes(key)
    *values, _, made = f.axes(value)
    tie(features, key_features)
    close(features, FEATURES)
    close(made, FEATURES)
    if shared and batch[-1].size != others[-1].size:
        each = batch[-1].size // others[-1].size
        others[-1] = within([others[-1], fixed(each, "query heads of one key head")])
        values[-1] = within([values[-1], fixed(each, "query heads of one key head")])
    f.broadcast(f.broadcast(batch, others), values)
    if isinstance(mask, Value) and len(mask.shape) > 2:
        f.broadcast(batch, f.axes(mask)[:-2])
    for axis in batch:
        mark(axis, "attended")
    return [*batch, positions, made]
