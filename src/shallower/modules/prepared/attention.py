"""`nn.MultiheadAttention` of which heads are cut, or what it reads: the two widths need not be one.

    make_dense(encoder.layers[0].self_attn)

The stock layer divides what it reads by the number of heads. This one takes the width of a head from its projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


class DenseAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose heads together may be narrower or wider than what it reads and gives.

        attention = nn.MultiheadAttention(64, 8, batch_first=True)
        make_dense(attention)
        isinstance(attention, DenseAttention)       # with the same parameters, arguments and results

    It has no fast path for nested tensors.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        padding, mask = _additive(key_padding_mask, query), _additive(attn_mask, query)
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = _steps_first(query, key, value)
        made, weights = multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=padding,
            need_weights=need_weights,
            attn_mask=mask,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            head_dim=self.head_dim,
        )
        if turned:
            made = made.transpose(1, 0)
        return made, weights


def make_dense(attention: nn.MultiheadAttention) -> None:
    """Let a layer be a `DenseAttention`, in place; its parameters stay, and the width of a head."""
    attention.__class__ = DenseAttention
    attention._qkv_same_embed_dim = False  # by which layers of encoders switch off their fast path


def is_stock(module: nn.Module) -> bool:
    """Whether it is an `nn.MultiheadAttention` itself, no subclass with a forward of its own."""
    return type(module) is nn.MultiheadAttention


def count_attention_anew(attention: nn.MultiheadAttention) -> None:
    """Set the widths that a layer reads to those of its projections."""
    for name, width in (("q_proj_weight", "embed_dim"), ("k_proj_weight", "kdim"), ("v_proj_weight", "vdim")):
        own = attention._parameters[name]
        setattr(attention, width, (attention.in_proj_weight if own is None else own).shape[1])


def multi_head_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, *weights: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`, with the same arguments, for heads of any common width.

        made, _ = multi_head_attention_forward(x, x, x, 64, 8, packed, bias, None, None, False, 0.0, out, out_bias)

    Args:
        query, key, value: (steps, batch, channels), or without a batch.
        embed_dim: the channels of the query; not looked at.
        num_heads: how many heads.
        weights: in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias.
        options: the arguments behind these, and `head_dim`. Masks are added to the scores.

    Returns:
        (steps, batch, rows of out_proj_weight), and the weights of attention where they are needed.
    """
    operands: tuple[Any, ...] = (query, key, value, *weights)
    if has_torch_function(operands):
        made: tuple[Tensor, Tensor | None] = handle_torch_function(
            multi_head_attention_forward, operands, query, key, value, embed_dim, num_heads, *weights, **options
        )
        return made
    if query.dim() == 3:
        return _attention(query, key, value, num_heads, weights, options)
    padding = options.get("key_padding_mask")
    if padding is not None:
        options["key_padding_mask"] = padding.unsqueeze(0)
    given, scores = _attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), num_heads, weights, options)
    return given.squeeze(1), None if scores is None else scores.squeeze(0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, weights: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    packed, bias, bias_k, bias_v, with_zero, dropout, out, out_bias = weights
    projections: Any = [options.get(f"{name}_proj_weight") for name in "qkv"]
    if packed is not None:
        projections = packed.chunk(3)
    biases = [None] * 3 if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), projections, biases, strict=True))
    if bias_k is not None:
        k, v = (torch.cat((x, own.expand(-1, x.shape[1], -1))) for x, own in ((k, bias_k), (v, bias_v)))
    if with_zero:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    head = options.get("head_dim", -1)
    q, k, v = (x.view(*x.shape[:-1], num_heads, head).permute(1, 2, 0, 3) for x in (q, k, v))
    if not options.get("training", True):
        dropout = 0.0
    padding, mask = options.get("key_padding_mask"), options.get("attn_mask")
    causal = options.get("is_causal", False) and padding is None and not options.get("need_weights", True)
    mask = None if causal else _added(mask, padding, q, k)
    scores = None
    if options.get("need_weights", True):
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        scores = F.dropout(scores.softmax(-1), dropout)
        made = scores @ v
        if options.get("average_attn_weights", True):
            scores = scores.mean(1)
    else:
        made = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return F.linear(made.permute(2, 0, 1, 3).flatten(2), out, out_bias), scores


def _added(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to scores (batch, heads, steps, steps), from what is given for steps and for the batch's keys."""
    batch, heads, steps, _ = q.shape
    found: Tensor | None = None
    if mask is not None:
        found = mask.view(batch, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
    if padding is not None:
        keys = padding[:, None, None]
        found = keys if found is None else found + keys
    if found is None:
        return None
    # positions that the layer itself puts behind the keys are seen by all
    found = F.pad(found, (0, k.shape[-2] - found.shape[-1]))
    return found.expand(batch, heads, steps, -1)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as what is added to scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, float("-inf"))


def _steps_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, steps, channels) turned; what was one tensor stays one."""
    turned = query.transpose(1, 0)
    keys = turned if key is query else key.transpose(1, 0)
    if value is key:
        return turned, keys, keys
    return turned, keys, value.transpose(1, 0)
