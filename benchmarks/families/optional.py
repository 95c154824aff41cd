"""What models may be given besides what they run on: segments, prompts, what other networks made.

for richer in optional_inputs(config, inputs):
    model(**richer)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.families.tiny import fields

Named = dict[str, Any]


def optional_inputs(config: Any, inputs: Named) -> Iterator[Named]:
    """The inputs with one more argument that some models take, or several that belong together."""
    known = fields(config)
    for more in (*_of_tokens(inputs.get("input_ids"), known), *_prompts(known), *_made_elsewhere(known)):
        yield {**inputs, **more}


def _of_tokens(ids: Tensor | None, known: Mapping[str, Any]) -> Iterator[Named]:
    """What is said of each token, or stands between them."""
    if ids is None:
        yield {"input_ids": torch.randint(5, 90, (2, 8)), "bbox": torch.tensor([1, 2, 5, 7]).repeat(2, 8, 1)}
        return
    second, first = torch.zeros_like(ids), torch.zeros_like(ids)
    second[:, ids.shape[1] // 2 :] = 1
    first[:, 0] = 1
    yield {"token_type_ids": second}
    yield {"attention_mask": torch.ones_like(ids), "global_attention_mask": first}
    yield {
        "attention_mask": torch.ones_like(ids),
        "visual_embeds": torch.randn(2, 3, _size(known, "visual_embedding_dim", 32)),
        "visual_attention_mask": torch.ones(2, 3, dtype=torch.long),
        "visual_token_type_ids": torch.ones(2, 3, dtype=torch.long),
    }
    frames = torch.randint(0, _size(known, "codebook_size", 64), (2, 4, _size(known, "num_codebooks", 8)))
    for mark in ("audio_token_id", "audio_token_index"):
        if isinstance(known.get(mark), int):
            spoken = torch.cat((ids, torch.full((2, 4), known[mark])), 1)
            yield {"input_ids": spoken, "audio_input_ids": frames}
    if "audio_prompt_token_id" in known:
        spoken = torch.cat((torch.full((2, 3), known["audio_prompt_token_id"]), ids), 1)
        yield {"input_ids": spoken, "audio_prompt_latents": torch.randn(2, 3, _size(known, "latent_dim", 32))}
    across = _size(known, "latent_query_num", 64)
    places = torch.cat((torch.zeros_like(ids[:, :1]), torch.ones(2, across, dtype=torch.long), second * 0), 1)
    patches = torch.randn(2, 16, 2 + _size(known, "patch_embed_hidden_size", 192))
    patches[:, :, :2] = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5))
    with_pictures = torch.cat((ids[:, :1], ids.new_full((2, across), 7), ids), 1)
    pictured: Named = {"input_ids": with_pictures, "flattened_patches": patches, "image_embeds_position_mask": places}
    yield {**pictured, "width": torch.full((2,), 4), "height": torch.full((2,), 4)}
    # a longer text, so that every expert is given some of it
    longer = torch.randint(5, 90, (2, 48))
    yield {"input_ids": longer}
    yield {"input_ids": longer, "decoder_input_ids": longer}


def _prompts(known: Mapping[str, Any]) -> Iterator[Named]:
    """What is marked in a picture."""
    points = {
        "input_points": torch.tensor([[[4.0, 5.0], [20.0, 9.0]]]).expand(2, 1, 2, 2).contiguous(),
        "input_labels": torch.tensor([[[1, 0]]]).expand(2, 1, 2).contiguous(),
    }
    boxes = torch.tensor([[[4.0, 5.0, 20.0, 19.0]]]).expand(2, 1, 4).contiguous()
    side = 4 * (_size(known, "image_size", 32) // _size(known, "patch_size", 8))
    yield points
    yield {"input_boxes": boxes}
    yield {**points, "input_boxes": boxes}
    yield {"input_boxes": boxes / 32, "input_boxes_labels": torch.tensor([[1], [0]])}
    yield {"input_masks": torch.randn(2, 1, side, side)}


def _made_elsewhere(known: Mapping[str, Any]) -> Iterator[Named]:
    """What other networks made of a picture, a voice or a protein."""
    hidden = _size(known, "hidden_size", _size(known, "d_model", 32))
    yield {"encoder_hidden_states": torch.randn(2, 5, _size(known, "cross_attention_hidden_size", hidden))}
    yield {"fine": True}
    yield {"use_vit_merger": True}
    yield {"prompt_depth": torch.rand(2, 1, 8, 8)}
    proteins = torch.randint(5, 20, (2, 6))
    yield {"protein_input_ids": proteins, "protein_attention_mask": torch.ones_like(proteins)}


def _size(known: Mapping[str, Any], name: str, usual: int) -> int:
    value = known.get(name)
    if isinstance(value, int) and value > 0:
        return value
    return usual
