"""Inputs of models that read text with pictures or sounds in it: a row of token ids with the marks where they stand.

    for inputs in mixed_inputs(model, config):
        model(**inputs)

How many marks a picture needs is found by trying: a model says where it is another number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.tiny import MARKED, fields

MOST_MARKS = (4, 16, 1, 8, 2, 32, 5, 17, 64, 25, 10, 20, 40, 3, 6, 9, 12, 50)
"""How many marks there may be for one picture or sound, the likeliest first."""


def mixed_inputs(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """What a model of text with pictures or sounds may take; nothing for other models."""
    taken = set(inspect.signature(model.forward).parameters)
    marks = _marks(fields(config))
    options = [(marks["image"], picture) for picture in _pictures(config, taken) if "image" in marks]
    options += [(marks["audio"], sound) for sound in _sounds(config, taken) if "audio" in marks]
    for (mark, media), count in product(options, MOST_MARKS):
        ids = torch.randint(5, 90, (2, 6))
        ids = torch.cat([ids[:, :2], torch.full((2, count), mark), ids[:, 2:]], 1)
        inputs: dict[str, Any] = {"input_ids": ids, **media}
        if "mm_token_type_ids" in taken:
            inputs["mm_token_type_ids"] = (ids == mark).long()
        if "token_type_ids" in taken:
            inputs["token_type_ids"] = (ids == mark).long()
        yield inputs


def _marks(known: Mapping[str, Any]) -> dict[str, int]:
    """The ids that stand for a picture or a sound."""
    found = {}
    for kind in MARKED:
        for ending in ("token_id", "token_index"):
            mark = known.get(f"{kind}_{ending}")
            if isinstance(mark, int):
                found[kind] = mark
    return found


def _pictures(config: Any, taken: set[str]) -> Iterator[dict[str, Any]]:
    """Two pictures, as one or another model takes them."""
    if "pixel_values" not in taken:
        return
    known = _part(config, "vision_config")
    size, patch = _number(known, "image_size", 32), _number(known, "patch_size", 8)
    whole = torch.randn(2, 3, size, size)
    sizes = torch.tensor([[size, size]] * 2)
    if "image_grid_thw" in taken:
        across = 4
        grid = torch.tensor([[1, across, across]] * 2)
        frames = _number(known, "temporal_patch_size", 1)
        patches = torch.randn(2 * across * across, 3 * frames * patch * patch)
        yield {"pixel_values": patches, "image_grid_thw": grid}
        yield {"pixel_values": patches.view(-1, 3, frames, patch, patch).squeeze(2), "image_grid_thw": grid}
        yield {"pixel_values": whole, "image_grid_thw": torch.tensor([[1, size // patch, size // patch]] * 2)}
    if "image_sizes" in taken:
        yield {"pixel_values": whole, "image_sizes": sizes}
        yield {"pixel_values": torch.stack([whole, whole], 1), "image_sizes": sizes}
    if "pixel_attention_mask" in taken:
        yield {"pixel_values": whole[:, None]}
        patches = torch.randn(2, 16, 3 * patch * patch)
        mask = torch.ones(2, 16, dtype=torch.long)
        yield {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]] * 2)}
    if "image_position_ids" in taken:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
        yield {"pixel_values": torch.randn(2, 16, 3 * patch * patch), "image_position_ids": places}
    yield {"pixel_values": whole}
    yield {"pixel_values": whole[:, None]}


def _sounds(config: Any, taken: set[str]) -> Iterator[dict[str, Any]]:
    """Two sounds, as one or another model takes them."""
    if "input_features" not in taken:
        return
    known = _part(config, "audio_config", "encoder_config")
    mels = _number(known, "num_mel_bins", _number(known, "input_dim", 16))
    for length in (2 * _number(known, "max_source_positions", 64), 64):
        masks: dict[str, Tensor] = {}
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in taken:
                masks[name] = torch.ones(2, length, dtype=torch.long)
        yield {"input_features": torch.randn(2, mels, length), **masks}
        yield {"input_features": torch.randn(2, length, mels), **masks}
        yield {"input_features": torch.randn(2, length, mels)}


def _part(config: Any, *names: str) -> Mapping[str, Any]:
    """The fields of the first part that there is, or of the whole configuration."""
    for name in names:
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            return fields(part)
    return fields(config)


def _number(known: Mapping[str, Any], name: str, usual: int) -> int:
    """A whole number of a configuration, the first where it is several."""
    value = known.get(name)
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, int) and value > 0:
        return value
    return usual
