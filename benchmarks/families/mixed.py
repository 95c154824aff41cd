"""Inputs of models that read text with pictures, sounds or videos in it: token ids with the marks where they stand.

    for inputs in mixed_inputs(model, config, {"input_ids": ids}, "image"):
        model(**inputs)

How many marks a picture needs is what the model makes of it, or else found by trying: it says where it is another
number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.axes import floats
from benchmarks.families.tiny import MARKED, fields

MOST_MARKS = (4, 16, 1, 8, 2, 32, 5, 17, 64, 25, 10, 20, 40, 3, 6, 9, 12, 50, 13)
"""How many marks there may be for one picture or sound, the likeliest first."""

ACROSS = 4
"""Patches along each side of a picture."""

Media = Iterator[dict[str, Any]]


def mixed_inputs(model: nn.Module, config: Any, inputs: Mapping[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """The inputs with two of a kind in their text, as one or another model takes them; nothing for other models."""
    taken = set(inspect.signature(model.forward).parameters)
    mark = _mark(fields(config), kind)
    ids = inputs.get("input_ids")
    if mark is None or ids is None:
        return
    for media in MEDIA[kind](config, taken):
        if not media.keys() <= taken:
            continue
        for count in dict.fromkeys((*_needed(model, kind, media), *MOST_MARKS)):
            marked = torch.cat([ids[:, :2], torch.full((2, count), mark), ids[:, 2:]], 1)
            yield {**inputs, "input_ids": marked, **media, **_types(marked, taken)}


def _mark(known: Mapping[str, Any], kind: str) -> int | None:
    """The id that stands for a picture, a sound or a video."""
    for ending in ("token_id", "token_index"):
        mark = known.get(f"{kind}_{ending}")
        if isinstance(mark, int):
            return mark
    return None


def _types(ids: Tensor, taken: set[str]) -> dict[str, Tensor]:
    """What each token is, for models that are told."""
    types = torch.zeros_like(ids)
    for i, mark in enumerate((MARKED["image"], MARKED["video"], MARKED["audio"]), 1):
        types[ids == mark] = i
    found = {}
    if "mm_token_type_ids" in taken:
        found["mm_token_type_ids"] = types
    if "token_type_ids" in taken:
        found["token_type_ids"] = (types == 1).long()
    if "qformer_input_ids" in taken:
        found["qformer_input_ids"] = ids[:, :2]
    return found


@torch.no_grad()
def _needed(model: nn.Module, kind: str, media: Mapping[str, Any]) -> list[int]:
    """How many marks one of two needs, from what the model makes of both; none where it does not say."""
    name = f"get_{kind}_features"
    read = next((getattr(m, name) for m in model.modules() if hasattr(m, name)), None)
    if read is None:
        return []
    try:
        made = read(**media)
    except Exception:  # of another kind than it takes
        return []
    parts = floats(getattr(made, "pooler_output", made))
    return [sum(part.numel() // part.shape[-1] for part in parts) // 2]


def pictures(config: Any, taken: set[str]) -> Media:
    """Two pictures."""
    known = _part(config, "vision_config")
    size, patch = _number(known, "image_size", 32), _number(known, "patch_size", 8)
    whole = torch.randn(2, 3, size, size)
    sizes = torch.tensor([[size, size]] * 2)
    rows = 2 * ACROSS * ACROSS
    if "image_grid_thw" in taken:
        grid = torch.tensor([[1, ACROSS, ACROSS]] * 2)
        frames = _number(known, "temporal_patch_size", _number(known, "patch_temporal", 1))
        patches = torch.randn(rows, 3 * frames * patch * patch)
        merge = torch.tensor([2, 2])
        yield {"pixel_values": patches, "image_grid_thw": grid, "image_merge_sizes": merge}
        yield {"pixel_values": patches, "image_grid_thw": grid}
        yield {"pixel_values": patches.view(-1, 3, frames, patch, patch).squeeze(2), "image_grid_thw": grid}
        merged = torch.tensor([[1, ACROSS // 2, ACROSS // 2]] * 2)
        yield {"pixel_values": patches.view(rows // 4, 2 * patch, 2 * patch, -1), "image_grid_thw": merged}
        yield {"pixel_values": whole, "image_grid_thw": torch.tensor([[1, size // patch, size // patch]] * 2)}
    if "image_grid_hw" in taken:
        yield {
            "pixel_values": torch.randn(rows, 3 * patch * patch),
            "image_grid_hw": torch.tensor([[ACROSS, ACROSS]] * 2),
        }
    if "target_sizes" in taken:
        packed = torch.randn(1, 3, patch, rows * patch)
        yield {"pixel_values": packed, "target_sizes": torch.tensor([[ACROSS, ACROSS]] * 2)}
    if "image_sizes" in taken:
        yield {"pixel_values": whole, "image_sizes": sizes}
        yield {"pixel_values": torch.stack([whole] * 5, 1), "image_sizes": 2 * sizes}
        yield {"pixel_values": torch.stack([whole] * 2, 1), "image_sizes": sizes}
    if "pixel_attention_mask" in taken:
        yield {"pixel_values": whole[:, None]}
        yield {"pixel_values": whole[:, None], "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
        patches = torch.randn(2, 16, 3 * patch * patch)
        mask = torch.ones(2, 16, dtype=torch.long)
        yield {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]] * 2)}
    if "image_position_ids" in taken:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
        yield {"pixel_values": torch.randn(2, 16, 3 * patch * patch), "image_position_ids": places}
    if "high_res_pixel_values" in taken:
        larger = _number(_part(config, "high_res_vision_config"), "image_size", 32)
        yield {"pixel_values": whole, "high_res_pixel_values": torch.randn(2, 3, larger, larger)}
    yield {
        "image_pixel_values": torch.stack([whole, whole], 1),
        "image_sizes": sizes,
        "image_attention_mask": torch.ones(2, 2, size // patch, size // patch),
    }
    yield {"pixel_values": whole}
    yield {"pixel_values": whole[:, None]}
    yield {"pixel_values": torch.randn(rows, 3 * patch * patch)}
    yield {"pixel_values": torch.randn(2, ACROSS * ACROSS, 3 * patch * patch)}


def _sounds(config: Any, taken: set[str]) -> Media:
    """Two sounds."""
    known = _part(config, "audio_config", "encoder_config")
    mels = _number(known, "num_mel_bins", _number(known, "input_dim", _number(known, "input_size", 16)))
    for length in (2 * _number(known, "max_source_positions", 64), 64, 2 * _number(known, "n_window", 16)):
        masks: dict[str, Tensor] = {}
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in taken:
                masks[name] = torch.ones(2, length, dtype=torch.long)
        yield {"input_features": torch.randn(2, mels, length), **masks}
        yield {"input_features": torch.randn(2, length, mels), **masks}
        yield {"input_features": torch.randn(2, length, mels)}
    reduced = 64 // _number(known, "time_reduction", 8)
    yield {"audio_input_features": torch.randn(2, 64, mels), "audio_embed_sizes": torch.tensor([reduced] * 2)}


def _videos(config: Any, taken: set[str]) -> Media:
    """Two videos of two frames each."""
    known = _part(config, "vision_config")
    size, patch = _number(known, "image_size", 32), _number(known, "patch_size", 8)
    if "video_grid_thw" in taken:
        frames = _number(known, "temporal_patch_size", _number(known, "patch_temporal", 1))
        patches = torch.randn(4 * ACROSS * ACROSS, 3 * frames * patch * patch)
        yield {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[2, ACROSS, ACROSS]] * 2)}
    yield {"pixel_values_videos": torch.randn(2, 2, 3, size, size)}
    yield {"pixel_values_videos": torch.randn(2, _number(known, "num_frames", 8), 3, size, size)}


MEDIA: Mapping[str, Callable[[Any, set[str]], Media]] = {"image": pictures, "audio": _sounds, "video": _videos}


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
