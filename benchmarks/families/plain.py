"""What models may run on, the likeliest first: text, pictures, sounds, series.

for inputs in plain_inputs(model, config):
    model(**inputs)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.mixed import MEDIA, mixed_inputs, pictures
from benchmarks.families.tiny import fields

Named = dict[str, Any]


def plain_inputs(model: nn.Module, config: Any) -> Iterator[Named]:
    """What the model may take, the likeliest first: all that it can read, where it reads more than text."""
    words = {"input_ids": torch.randint(5, 90, (2, 6))}
    for kind in MEDIA:
        yield from mixed_inputs(model, config, words, kind)
    known = fields(config)
    # where experts take no more than so many tokens, enough for each of them to be given some
    ids = torch.randint(5, 90, (2, 48 if "expert_capacity" in known else 8))
    size = known.get("image_size") or 32
    if isinstance(size, (tuple, list)):
        size = size[0]
    channels = known.get("num_channels") or 3
    whole = torch.randn(2, channels if isinstance(channels, int) else 3, int(size), int(size))
    frames = torch.randn(2, 2, 3, int(size), int(size))
    mels = known.get("num_mel_bins") or known.get("feature_size") or known.get("input_feat_per_channel") or 16
    options: Mapping[str, Callable[[], Iterator[Named]]] = {
        "input_ids": lambda: _texts(ids, whole, frames, known),
        "pixel_values": lambda: _pictures(ids, whole, frames, known),
        "pixel_values_videos": lambda: iter([{"pixel_values_videos": frames}]),
        "input_values": lambda: _sounds(ids, mels, known),
        "input_features": lambda: _spectra(ids, mels),
        "past_values": lambda: _series(known),
        "hidden_states": lambda: _patches(model, config),
    }
    main = getattr(model, "main_input_name", "input_ids")
    for key in sorted(options, key=lambda key: key != main):
        yield from options[key]()


def _texts(ids: Tensor, whole: Tensor, frames: Tensor, known: Mapping[str, Any]) -> Iterator[Named]:
    """Text, alone or with what belongs to it."""
    boxes = torch.tensor([1, 2, 5, 7]).repeat(*ids.shape, 1)
    places = torch.arange(6).view(1, 3, 2).expand(2, 3, 2)
    steps = torch.randint(0, 9, (2, 8, int(known.get("max_depth") or 8)))
    hidden = int(known.get("hidden_size") or 32)
    yield {"input_ids": ids, "pixel_values": whole, "bbox": boxes}
    yield {"input_ids": ids, "pixel_values": whole}
    yield {"input_ids": ids, "entity_ids": ids[:, :3], "entity_position_ids": places}
    yield {"input_ids": ids, "xpath_tags_seq": steps, "xpath_subs_seq": steps}
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids[:, : ids.shape[1] - 3]}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield {"input_ids": ids, "bbox": boxes}
    yield {"input_ids": ids, "bbox": boxes.float() / 9}
    yield {"input_ids": ids, "bbox": boxes, "decoder_input_ids": ids}
    yield {"input_ids": ids, "bbox": boxes.float() / 9, "pixel_values": whole, "decoder_input_ids": ids}
    yield {"query_embeds": torch.randn(2, 8, hidden)}
    yield {"query_embeds": torch.randn(2, 8, hidden), "encoder_hidden_states": torch.randn(2, 5, _wide(known, hidden))}
    yield {"input_ids": torch.randint(5, 90, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    yield {"input_ids": ids, "pixel_values": frames}
    yield {"input_ids": ids, "pixel_values": whole[:, None], "image_attention_mask": torch.ones(2, 8, 1)}
    seen = torch.randn(2, 3, int(known.get("visual_feat_dim") or 2048))
    yield {"input_ids": ids, "visual_feats": seen, "visual_pos": torch.rand(2, 3, 4)}
    across = int(known.get("latent_query_num") or 6)
    marks = torch.cat((torch.zeros(2, 1), torch.ones(2, across), torch.zeros(2, 8)), 1).long()
    words = torch.cat((ids[:, :1], ids.new_full((2, across), 7), ids[:, :8]), 1)
    yield {"input_ids": words, "pixel_values": whole, "image_embeds_position_mask": marks}


def _wide(known: Mapping[str, Any], usual: int) -> int:
    """Features of what is made elsewhere."""
    return int(known.get("encoder_hidden_size") or usual)


def _pictures(ids: Tensor, whole: Tensor, frames: Tensor, known: Mapping[str, Any]) -> Iterator[Named]:
    """Pictures and videos."""
    yield {"pixel_values": whole}
    yield {"pixel_values": whole, "input_ids": ids}
    yield {"pixel_values": torch.randn(2, 3, 64, 64)}
    yield {"pixel_values": whole, "decoder_input_ids": ids}
    yield {"pixel_values": frames}
    yield {"pixel_values": frames, "input_ids": ids}
    yield {"pixel_values": torch.randn(2, 3, 32, 128)}
    yield {"pixel_values": torch.randn(2, 3, 128, 128)}
    yield {"pixel_values": torch.randn(2, 3, 128, 128), "input_ids": ids}
    width = 2 + int(known.get("patch_embed_hidden_size") or 768)
    yield {"flattened_patches": torch.randint(1, 5, (2, 16, width)).float(), "decoder_input_ids": ids}
    yield {"pixel_values": whole, "task_inputs": torch.rand(2, int(known.get("task_seq_len") or 77))}


def _sounds(ids: Tensor, mels: int, known: Mapping[str, Any]) -> Iterator[Named]:
    """Waves."""
    yield {"input_values": torch.randn(2, 800)}
    yield {"input_values": torch.randn(2, 1, 800)}
    yield {"input_values": torch.randn(2, 4000)}
    yield {"input_values": torch.randn(2, known.get("max_length") or 64, mels)}
    yield {"input_values": torch.randn(2, 800), "decoder_input_ids": ids}
    yield {"input_values": torch.randn(2, 4000), "decoder_input_ids": ids}


def _spectra(ids: Tensor, mels: int) -> Iterator[Named]:
    """Spectrograms."""
    yield {"input_features": torch.randn(2, 40, mels)}
    yield {"input_features": torch.randn(2, mels, 128)}
    yield {"input_features": torch.randn(2, 40, mels), "decoder_input_ids": ids}
    yield {"input_features": torch.randn(2, mels, 128), "decoder_input_ids": ids}
    for length in (128, 100):
        mask = torch.ones(2, length, dtype=torch.long)
        yield {"input_features": torch.randn(2, mels, length), "input_features_mask": mask}
        yield {"input_features": torch.randn(2, length, mels), "input_features_mask": mask}


def _series(known: Mapping[str, Any]) -> Iterator[Named]:
    """What was measured over time, and what an agent saw, did and was given for it."""
    length = known.get("context_length") or 64
    yield {"past_values": torch.randn(2, length, known.get("num_input_channels") or 1)}
    yield {"past_values": torch.randn(2, length)}
    length += max(known.get("lags_sequence") or [0])
    ahead = known.get("prediction_length") or 8
    times = int(known.get("num_time_features") or 0)
    yield {
        "past_values": torch.randn(2, length),
        "past_time_features": torch.randn(2, length, times),
        "past_observed_mask": torch.ones(2, length),
        "future_values": torch.randn(2, ahead),
        "future_time_features": torch.randn(2, ahead, times),
    }
    yield {
        "states": torch.randn(2, 6, known.get("state_dim") or 17),
        "actions": torch.randn(2, 6, known.get("act_dim") or 4),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).expand(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }


def _patches(model: nn.Module, config: Any) -> Iterator[Named]:
    """Pictures in pieces, as the towers of models of text and pictures take them."""
    taken = set(inspect.signature(model.forward).parameters)
    names = {
        "image_grid_thw": "grid_thw",
        "image_merge_sizes": "merge_sizes",
        "image_position_ids": "pixel_position_ids",
    }
    names = {ours: theirs for ours, theirs in names.items() if theirs in taken}
    if "hidden_states" in taken:
        names["pixel_values"] = "hidden_states"
    for media in pictures(config, {*taken, *names, "pixel_attention_mask"}):
        yield {names.get(key, key): value for key, value in media.items()}
