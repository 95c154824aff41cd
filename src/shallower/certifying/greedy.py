"""Texts that language models write by always taking the likeliest token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shallower.certifying.bounds import ratio_over_rows
from shallower.certifying.certificate import Greedy, GreedyAgreement
from shallower.core.batches import Batch
from shallower.core.inputs import call, model_device
from shallower.core.modes import evaluating

_AT_ONCE = 32
"""Texts."""


def writes(model: nn.Module) -> bool:
    """Whether a model writes texts: it continues its own `input_ids`."""
    can = getattr(model, "can_generate", None)
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(can) and bool(can()) and not paired


def prompts_in(batch: Batch, length: int) -> Iterator[Tensor | None]:
    """For each row its first tokens, (length,); None where it has fewer, or no tokens at all."""
    ids = None
    if isinstance(batch.inputs, Mapping):
        ids = batch.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        yield from [None] * batch.rows
        return
    for index, row in enumerate(ids):
        counted = row
        if batch.mask is not None and batch.mask.shape == ids.shape:
            counted = row[batch.mask[index].bool()]
        if len(counted) < length:
            yield None
        else:
            yield counted[:length]


def agreement(
    dense: nn.Module, small: nn.Module, prompts: list[Tensor], greedy: Greedy, seed: int
) -> GreedyAgreement | None:
    """How long the texts of both agree that begin with these prompts; None where there is no prompt, or no room.

    agreement(model, small, [ids[:16] for ids in rows], sh.Greedy(), seed=0)
    """
    tokens = min(greedy.tokens, _most_tokens(dense) - greedy.prompt)
    if not prompts or tokens < 1:
        return None
    agreed: list[Tensor] = []
    for start in range(0, len(prompts), _AT_ONCE):
        begun = torch.stack(prompts[start : start + _AT_ONCE])
        same = written(small, begun, tokens) == written(dense, begun, tokens)
        agreed.append(same.long().cumprod(1).sum(1))
    lengths = torch.cat(agreed).double()
    identical = int((lengths == tokens).sum())
    estimate = ratio_over_rows(lengths, torch.ones_like(lengths), seed)
    return GreedyAgreement(len(prompts), greedy.prompt, tokens, estimate, identical)


def written(model: nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """So many tokens after each prompt, (texts, tokens); with the model's cache where it has one.

    written(model, ids[:, :16], 32)
    """
    text = prompts.to(model_device(model))
    inputs: dict[str, Any] = {"input_ids": text}
    with evaluating(model):
        for _ in range(tokens):
            output = call(model, {**inputs, "attention_mask": torch.ones_like(text), "use_cache": True})
            following = output.logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, following], 1)
            cache = getattr(output, "past_key_values", None)
            inputs = {"input_ids": text}
            if cache is not None:
                inputs = {"input_ids": following, "past_key_values": cache}
    return text[:, prompts.shape[1] :].cpu()


def _most_tokens(model: nn.Module) -> int:
    """Tokens that a text may have."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        return limit
    return 1 << 30
