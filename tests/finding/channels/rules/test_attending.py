"""Attention as one operation."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage


def heads(x, count):
    """(batch, positions, channels) -> (batch, heads, positions, features)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q, k, v, count):
    """Attention of projected queries, keys and values, heads joined again."""
    return F.scaled_dot_product_attention(heads(q, count), heads(k, count), heads(v, count)).transpose(1, 2).flatten(2)


def layer(x, w, b, o, p, count=2):
    """The function behind nn.MultiheadAttention; q, k and v in one weight."""
    width = x.shape[-1]
    made = F.multi_head_attention_forward(
        x, x, x, width, count, w, b, None, None, False, 0.0, o, p, training=False, need_weights=False
    )
    return made[0]


def by_hand(x, w, b, o, p, count=2):
    """The same, of weights that have lost heads."""
    q, k, v = F.linear(x, w, b).transpose(0, 1).chunk(3, -1)
    return F.linear(attend(q, k, v, count), o, p).transpose(0, 1)


def with_extra(x, w, o, k, v, count=2):
    """A position of its own that all attend to, with learned keys and values."""
    made = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], count, w, None, k, v, False, 0.0, o, None, training=False, need_weights=False
    )
    return made[0]


def with_extra_by_hand(x, w, o, k, v, count=2):
    """The same by hand."""
    queries, keys, values = F.linear(x, w).transpose(0, 1).chunk(3, -1)
    keys, values = (torch.cat([t, extra.expand(t.shape[0], -1, -1)], 1) for t, extra in ((keys, k), (values, v)))
    return F.linear(attend(queries, keys, values, count), o).transpose(0, 1)


def separate(q, k, v, a, b, c, o, count=2):
    """Queries, keys and values with weights of their own."""
    made = F.multi_head_attention_forward(
        q, k, v, q.shape[-1], count, torch.empty([0]), None, None, None, False, 0.0, o, None, training=False,
        need_weights=True, use_separate_proj_weight=True, q_proj_weight=a, k_proj_weight=b, v_proj_weight=c,
    )  # fmt: skip
    return made[0]


def separate_by_hand(q, k, v, a, b, c, o, count=2):
    """The same by hand."""
    q, k, v = (F.linear(x, w).transpose(0, 1) for x, w in ((q, a), (k, b), (v, c)))
    return F.linear(attend(q, k, v, count), o).transpose(0, 1)


def with_masks(x, w, o, m, count=2):
    """A mask for each head, and the weights of each."""
    return F.multi_head_attention_forward(
        x, x, x, x.shape[-1], count, w, None, None, None, False, 0.0, o, None, training=False, attn_mask=m,
        average_attn_weights=False,
    )  # fmt: skip


def with_masks_by_hand(x, w, o, m, count=2):
    """The same by hand."""
    q, k, v = (heads(t, count) for t in F.linear(x, w).transpose(0, 1).chunk(3, -1))
    weights = (q @ k.mT / 3**0.5 + m.unflatten(0, (-1, count))).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), o).transpose(0, 1), weights


USAGES = [
    Usage(
        "heads",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "q:2,3,4,6 k:2,3,5,6 v:2,3,5,7",
        "q0 k0 v0|q1 k1 v1",
    ),
    Usage(
        "a mask for all heads",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        "q:2,3,4,6 k:2,3,5,6 v:2,3,5,6 m:2,1,4,5",
        "q0 k0 v0 m0|q1 k1 v1",
    ),
    Usage(
        "a slope for each head",
        lambda q, k, v, s, d: F.scaled_dot_product_attention(q, k, v, attn_mask=s[:, None, None] * d),
        "q:2,3,4,6 k:2,3,5,6 v:2,3,5,6 s:3 d:4,5",
        "q0 k0 v0|q1 k1 v1 s0",
    ),
    Usage(
        "grouped queries",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "q:2,6,4,6 k:2,3,5,6 v:2,3,5,6",
        "q0 k0 v0|q1 k1 v1",
    ),
    Usage(
        "key heads that are shared, and value heads that are not",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "q:2,6,4,6 k:2,3,5,6 v:2,6,5,6",
        "q0 k0 v0|q1 k1 v1",
    ),
    Usage(
        "grouped queries by hand",
        lambda q, k, v, n=2: F.scaled_dot_product_attention(q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)),
        "q:2,6,4,6 k:2,3,5,6 v:2,3,5,6",
        "q0 k0 v0|q1 k1 v1",
    ),
    Usage(
        "one head",
        lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]),
        "q:4,6 k:5,6 v:5,7",
        "q1 k1|v1",
    ),
    Usage(
        "one head of a given scale",
        lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], scale=0.5),
        "q:4,6 k:5,6 v:5,7",
        "q1 k1|v1",
    ),
    Usage("no heads", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "q:2,4,6 k:2,5,6 v:2,5,6", "q0 k0 v0"),
    Usage(
        "projections",
        lambda x, q, k, v, o, h=3: F.linear(attend(F.linear(x, q), F.linear(x, k), F.linear(x, v), h), o),
        "x:2,4,5 q:6,5 k:6,5 v:6,5 o:5,6",
        "x0|x2 q1 k1 v1|q0 k0 v0 o1|o0",
    ),
    Usage(
        "step by step",
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
        "q:2,3,4,6 k:2,3,5,6 v:2,3,5,7",
        "q0 k0 v0|q1 k1 v1|q2|q3 k3|v3",
    ),
    Usage("the function of a layer", layer, "x:4,2,6 w:18,6 b:18 o:6,6 p:6", "x1|x2 w1|w0 b0 o1|o0 p0", again=by_hand),
    Usage(
        "masks and weights of heads",
        with_masks,
        "x:4,3,6 w:18,6 o:6,6 m:6,4,4",
        "x1 m0|x2 w1|w0 o1 m0|o0",
        again=with_masks_by_hand,
    ),
    Usage(
        "learned keys",
        with_extra,
        "x:4,2,6 w:18,6 o:6,6 k:1,1,6 v:1,1,6",
        "x1|x2 w1|w0 o1 k2 v2|o0",
        again=with_extra_by_hand,
    ),
    Usage(
        "queries and keys of other widths",
        separate,
        "q:4,2,6 k:5,2,3 v:5,2,4 a:6,6 b:6,3 c:6,4 o:6,6",
        "q1 k1 v1|q2 a1|k2 b1|v2 c1|a0 b0 c0 o1|o0",
        again=separate_by_hand,
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()


def test_the_features_of_a_head_stay():
    found = USAGES[0].check()
    assert found.reasons["q3"] == "the features of a head stay; heads can be cut"


def test_heads_stay_where_the_average_of_their_weights_is_read():
    usage = Usage(
        "an average of heads",
        lambda x, w, o: F.multi_head_attention_forward(
            x, x, x, 6, 2, w, None, None, None, False, 0.0, o, None, training=False
        ),
        "x:4,3,6 w:18,6 o:6,6",
        "x1|x2 w1|o0",
        again=lambda x, w, o: _average_by_hand(x, w, o),
    )
    assert usage.check().reasons["o1"] == "`multi_head_attention_forward` in Holder gives an average over its heads"


def _average_by_hand(x, w, o):
    q, k, v = (heads(t, 2) for t in F.linear(x, w).transpose(0, 1).chunk(3, -1))
    weights = (q @ k.mT / 3**0.5).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), o).transpose(0, 1), weights.mean(1)
