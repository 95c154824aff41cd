"""Tiny configurations of Transformers models, made from the defaults by the names of their fields.

config = tiny_config(transformers.LlamaConfig)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.families.agreeing import AGREEING

WORDS = 99

VARIANTS: tuple[dict[str, int], ...] = (
    {"hidden": 32, "heads": 4, "kv heads": 2, "head": 8},
    {"hidden": 32, "heads": 4, "kv heads": 4, "head": 8},
    {"hidden": 32, "heads": 8, "kv heads": 4, "head": 8},
    {"hidden": 256, "heads": 2, "kv heads": 2, "head": 128},
)
"""Sizes that have to fit together in one way or another."""

SIZES: tuple[tuple[int | str, str], ...] = (
    (WORDS, "(vocab|vocabulary)_?size num_embeddings n_words num_tokens"),
    (64, "codebook_size"),
    (4, "qk_rope_head_dim rotary_dim"),
    (
        "head",
        "hidden_size_per_head head_dim d_kv attention_head_size attn_head_size key_dim value_dim d_head kv_channels",
    ),
    ("head", "qk_nope_head_dim v_head_dim head_size global_head_dim"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank lora_rank hidden_size_per_layer_input"),
    (24, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size"),
    (40, "ffn_dim ffn_size intermediate_size intermediate_dim d_ff hidden_dim n_inner dim_feedforward"),
    (40, "ffn_hidden_size feed_forward_size"),
    (
        "kv heads",
        "num_key_value_heads num_kv_heads n_head_kv num_k_v_heads multi_query_group_num num_global_key_value_heads",
    ),
    ("heads", "num_attention_heads num_heads n_heads? attention_heads nhead num_query_heads"),
    (2, "num_hidden_layers num_layers n_layers? encoder_layers decoder_layers depth num_blocks num_hidden_groups"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_top_k moe_k num_selected_experts"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (4, "num_experts num_local_experts num_routed_experts n_routed_experts moe_num_experts"),
    (1, "first_k_dense_replace moe_layer_start_index"),
    (64, "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len seq_length n_ctx"),
    (64, "max_sequence_length max_length"),
    (32, "image_size img_size input_size crop_size"),
    (4, "mm_tokens_per_image"),
    (64, "pos_emb_width pos_emb_height"),
    (8, "patch_size num_conv_pos_embeddings"),
    (2, "num_frames tubelet_size num_conv_pos_embedding_groups"),
    (16, "conv_dim tdnn_dim num_mel_bins feature_size input_feat_per_channel feature_projection_input_dim"),
    (4, "sliding_window attention_window local_attention window_size"),
    (4, "state_size ssm_state_size mamba_d_state n_groups time_step_rank mamba_dt_rank"),
    (6, "num_queries num_latents num_query_tokens n_queries latent_query_num"),
    (16, "classifier_proj_size proj_size projection_dim projector_dim projection_size output_proj_dim"),
    ("hidden", "hidden_size d_model n_embd embed_dim dim embedding_size emb_dim hidden_channels d_embed n_embed"),
    (
        "hidden",
        "embedding_dim model_dim decoder_hidden_size fpn_hidden_size mask_feature_size feature_dim d_inner width",
    ),
    ("hidden", "lru_width stem_hidden_channels conv_stem_hidden_size"),
)
"""What a whole number becomes, by the name of its field or the end of it; the first that fits is taken."""

LISTS: tuple[tuple[Callable[[int], int], str], ...] = (
    (
        lambda i: 16 * (i + 1),
        "hidden_sizes embed_dims? dims encoder_hidden_sizes neck_hidden_sizes channels out_channels",
    ),
    (lambda _: 1, "depths layer_depths"),
    (lambda i: 2 ** (i + 1), "num_heads num_attention_heads encoder_attention_heads"),
    (lambda _: 16, "conv_dim tdnn_dim"),
    (lambda _: 32, "image_size"),
    (lambda _: 8, "patch_size"),
)
"""What each number of a list becomes, by its place."""

MISSING: dict[str, int | str] = {"vocab_size": WORDS, "head_dim": "head", "prediction_length": 8}
"""Fields that have a value only where one is given."""

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
AT_LAYERS = {"deepstack": 0, "global_attn_indexes": 1, "fullatt_block_indexes": 1}
"""What only some layers do: the one, of two, that does."""
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
MARKED = {"image": 91, "audio": 92, "video": 93}
"""The ids that stand for what is not text."""
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "cls_token_id": 1}
MARKS |= {"audio_prompt_token_id": 94, "audio_latent_token_id": 95, "audio_prompt_bos_token_id": 96}
MARKS |= {"audio_bos_token_id": 97}


def tiny_config(kind: type[Any], sizes: Mapping[str, int] = VARIANTS[0]) -> Any:
    """A configuration of this class, with its parts, as small as the names of its fields let one guess."""
    return _shrunk(kind(), sizes)


def _shrunk(config: Any, sizes: Mapping[str, int], within: str = "") -> Any:
    kind = type(config)
    known = set(inspect.signature(kind.__init__).parameters)
    for parent in kind.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    parts = set(getattr(config, "sub_configs", None) or {})
    given: dict[str, Any] = {"num_labels": 7}
    for name, value in vars(config).items():
        if name in parts and hasattr(value, "to_dict"):
            given[name] = _shrunk(value, sizes, f"{config.model_type}.{name}")
        elif name in known and not name.startswith("_"):
            small = shrunk_value(name, value, sizes)
            if small is not None:
                given[name] = small
            elif isinstance(value, str):
                given[name] = value
    for name, size in MISSING.items():
        if name in known and name in vars(config) and vars(config)[name] is None:
            given[name] = sizes[size] if isinstance(size, str) else size
    _fit_together(config, given, known)
    given.update(AGREEING.get(within, {}))
    return kind(**given)


def _fit_together(config: Any, given: dict[str, Any], known: set[str]) -> None:
    """What has to agree with other fields."""
    layers = next((given[name] for name in LAYERS if name in given), None)
    for name in PER_LAYER:
        value = getattr(config, name, None)
        if layers and isinstance(value, list) and name in known:
            given[name] = _varied(value, layers)
    for name, number in MARKS.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= WORDS and name in known:
            given[name] = number
    for kind, number in MARKED.items():
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if name in known:
                given[name] = number
    for name in known:
        if name.startswith(tuple(AT_LAYERS)) and isinstance(getattr(config, name, None), (list, tuple)):
            given[name] = [next(i for start, i in AT_LAYERS.items() if name.startswith(start))]
    stages = [name for name in getattr(config, "out_features", None) or [] if name.startswith("stage")]
    if stages and {"depths", "hidden_sizes", "embed_dims"} & vars(config).keys():
        given["out_features"] = stages  # there are as many of them as before
    if "use_cache" in known:
        given["use_cache"] = False
    if "qk_rope_head_dim" in given and "head_dim" in given:
        given["head_dim"] = given["qk_rope_head_dim"]
    if {"window_size", "spatial_merge_size", "patch_size"} <= vars(config).keys():
        given["window_size"] = 2 * config.spatial_merge_size * given["patch_size"]  # two merged patches
    if "pixel_shuffle_ratio" in vars(config):
        given["intermediate_size"] = int(given["hidden_size"] / config.pixel_shuffle_ratio**2)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        given["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    given.update(AGREEING.get(config.model_type, {}))


def shrunk_value(name: str, value: Any, sizes: Mapping[str, int]) -> Any:
    """What a field becomes; None where it stays."""
    if isinstance(value, bool) or not value:
        return None
    if isinstance(value, int):
        for size, endings in SIZES:
            if _ends(name, endings):
                return min(value, sizes[size] if isinstance(size, str) else size)
    if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        for size_at, endings in LISTS:
            if _ends(name, endings):
                # one head stays, and the channels of an image
                most = 1 if name.endswith("heads") else 3
                return type(value)(size if size <= most else size_at(i) for i, size in enumerate(value))
    return None


def _ends(name: str, endings: str) -> bool:
    return re.fullmatch(f"(.*_)?({endings.replace(' ', '|')})", name) is not None


def _varied(values: Sequence[Any], count: int) -> list[Any]:
    """As many values, with as many different ones among them as there can be."""
    found = list(dict.fromkeys(values))[:count]
    while len(found) < count:
        found.append(values[len(found)])
    return found


def fields(config: Any) -> Mapping[str, Any]:
    """The fields of a configuration and those of its parts."""
    found = dict(vars(config))
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            for key, value in fields(part).items():
                found.setdefault(key, value)
    return found
