"""Attention as one operation: heads can be cut, what a head is made of stays.

F.scaled_dot_product_attention(q, k, v, mask)
F.multi_head_attention_forward(x, x, x, width, heads, ...)
"""

from __future__ import annotations

from shallower.finding.channels.following import Axes, Following, leads_out, rule
from shallower.finding.channels.layout import Layout, close, divide, fixed, is_open, parts_of, tie, within
from shallower.finding.channels.rules.arguments import given, integer, optional, tensor
from shallower.recording.tracing import Call

FEATURES = "the features of a head stay; heads can be cut"
POSITIONS = "positions attend to each other"
SHARED = "query heads of one key head"


@rule("scaled_dot_product_attention")
def attention(f: Following, call: Call) -> Axes:
    """softmax(q k^T) v over (..., heads, positions, features)."""
    *queries, positions, features = f.axes(tensor(call, 0, "query"))
    *keys, places, key_features = f.axes(tensor(call, 1, "key"))
    *values, value_places, made = f.axes(tensor(call, 2, "value"))
    mask = optional(call, 3, "attn_mask")
    for first, second in ((features, key_features), (places, value_places)):
        tie(first, second)
    for axis in (positions, places):
        close(axis, POSITIONS)
    for own in (keys, values):
        if queries and queries[-1].size > own[-1].size > 1 and given(call, 7, "enable_gqa"):
            own[-1] = within([own[-1], fixed(queries[-1].size // own[-1].size, SHARED)])
    batch = f.broadcast(f.broadcast(queries, keys), values)
    if mask is not None:
        f.broadcast([*batch, positions, places], f.axes(mask))
    for axis in batch:
        f.mark(axis, "attended")
    _close_features(f, call, batch, features, made)
    return [*batch, positions, made]


def _close_features(f: Following, call: Call, heads: Axes, features: Layout, made: Layout) -> None:
    """What a head is made of stays; what a single one is made of may go, and the scale is of what stays."""
    if any(is_open(axis) for axis in heads):
        close(features, FEATURES)
        close(made, FEATURES)
    elif given(call, 6, "scale") is None:
        f.mark(features, "averaged")


@rule("multi_head_attention_forward")
def layer(f: Following, call: Call) -> list[Axes]:
    """The function behind `nn.MultiheadAttention`, with q, k and v in one weight or in three."""
    rows, columns = f.axes(tensor(call, 11, "out_proj_weight"))
    sources = [tensor(call, 0, "query"), tensor(call, 1, "key"), tensor(call, 2, "value")]
    _, *batch, _ = f.axes(sources[0])
    for source, (made, read) in zip(sources, _projections(f, call), strict=True):
        positions, *own, channels = f.axes(source)
        close(positions, POSITIONS)
        f.broadcast(batch, own)
        f.contract(call, channels, read)
        tie(made, columns)
    _tie_vectors(f, call, columns)
    count = integer(call, 4, "num_heads")
    heads, features = divide(columns, count, columns.size // count)
    close(features, FEATURES)
    f.mark(heads, "attended")
    f.contracted.append((columns, call))
    f.write(call, rows, optional(call, 12, "out_proj_bias"))
    _tie_masks(f, call, batch, heads)
    return _results(f, call, [*f.axes(sources[0])[:-1], rows], heads)


def _projections(f: Following, call: Call) -> list[tuple[Layout, Layout]]:
    """Rows and columns of the maps to q, k and v."""
    packed = optional(call, 5, "in_proj_weight")
    if packed is not None and not given(call, 17, "use_separate_proj_weight"):
        made, read = f.axes(packed)
        return [(part, read) for part in parts_of(made, [made.size // 3] * 3)]
    found: list[tuple[Layout, Layout]] = []
    for place, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight"), 18):
        made, read = f.axes(tensor(call, place, name))
        found.append((made, read))
    return found


def _tie_vectors(f: Following, call: Call, columns: Layout) -> None:
    """Biases, for each of the three maps and for a position that all attend to; masks are of positions."""
    bias = optional(call, 6, "in_proj_bias")
    if bias is not None:
        for part in parts_of(f.axes(bias)[0], [columns.size] * 3):
            tie(part, columns)
    for extra in (optional(call, 7, "bias_k"), optional(call, 8, "bias_v")):
        if extra is not None:
            tie(f.axes(extra)[-1], columns)


def _tie_masks(f: Following, call: Call, batch: Axes, heads: Layout) -> None:
    """Masks are of positions; (batch heads, positions, positions) where each head has its own."""
    for mask in (optional(call, 14, "key_padding_mask"), optional(call, 16, "attn_mask")):
        if mask is not None and len(mask.shape) == 3:
            tie(f.axes(mask)[0], within([*batch, heads]))
        if mask is not None:
            for axis in f.axes(mask)[-2:]:
                close(axis, POSITIONS)


def _results(f: Following, call: Call, made: Axes, heads: Layout) -> list[Axes]:
    """(positions, batch, channels), and the weights (batch, positions, positions), by heads or averaged over them."""
    found: list[Axes] = [made]
    for value in call.outputs[1:]:
        batch = made[1:-1]
        if len(value.shape) == len(batch) + 3:
            batch = [*batch, heads]
        elif leads_out(value):
            close(heads, f"{f.title(call)} gives an average over its heads")
        positions = value.shape[len(batch) :]
        found.append([*batch, *(fixed(size, POSITIONS) for size in positions)])
    return found
