"""What has to agree with sizes of other parts in tiny configurations, and is not told by the names of the fields.

for name, value in AGREEING["vipllava"].items():
    setattr(config, name, value)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SEVERAL_SIZES = [[32, 64], [64, 32], [64, 64]]
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_FOUR_LAYERS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_NARROW = {
    "hidden_dim": 640,
    "width_coefficient": 0.5,
    "depth_coefficient": 0.5,
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
}
_PYRAMID = {
    "encoder_in_channels": [32, 48, 64],
    "decoder_in_channels": [32, 32, 32],
    "encoder_hidden_dim": 32,
}
_MASKS = {"feature_size": 32, "fpn_feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "conv_dim": 32}

AGREEING: Mapping[str, Mapping[str, Any]] = {
    "align": {"projection_dim": 160},
    "align_vision_model": _NARROW,
    "aria": {"projector_patch_to_query_dict": {16: 6, 64: 8}},
    "autoformer": {"label_length": 4},
    "bit": {"num_groups": 4},
    "d_fine": _PYRAMID,
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "deimv2": _PYRAMID,
    "depth_anything.backbone_config": _FOUR_LAYERS,
    "donut-swin": {"image_size": 128},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientnet": _NARROW,
    "encodec": {"num_filters": 4, "codebook_dim": 32},
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "florence_vision": {"projection_dim": 32},
    "gemma3n_text": {"vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 99},
    "glm4v_text": {"rope_parameters": _SECTIONS},
    "glm_image_text": {"rope_parameters": _SECTIONS},
    "glm_ocr_text": {"rope_parameters": _SECTIONS},
    "glmasr_encoder": {"intermediate_size": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"context_size": 16},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 48],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hunyuan_vl_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 1, 1]}},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "llava_next": {"image_grid_pinpoints": _SEVERAL_SIZES},
    "llava_next_video": {"image_grid_pinpoints": _SEVERAL_SIZES},
    "llava_onevision": {"image_grid_pinpoints": _SEVERAL_SIZES},
    "lw_detr_vit": {"num_windows": 4},
    "mask2former": _MASKS,
    "maskformer": _MASKS,
    "mimi": {"num_filters": 4, "upsample_groups": 32, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32},
    "minicpm_ocr": {"insert_layer_id": 0},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "muse_glimmer": {"out_hidden_size": 128},
    "nemotron": {"num_key_value_heads": 2},
    "oneformer": _MASKS,
    "paligemma": {"projection_dim": 32},
    "paligemma.vision_config": {"projection_dim": 32},
    "perceiver": {"d_latents": 32, "num_cross_attention_heads": 4},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 32,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
    },
    "prompt_depth_anything.backbone_config": _FOUR_LAYERS,
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen3_5_text": {"pad_token_id": 0},
    "rt_detr": _PYRAMID,
    "rt_detr_v2": _PYRAMID,
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": {"image_size": 128},
    "textnet": {"stem_out_channels": 16},
    "tipsv2_dpt.backbone_config": _FOUR_LAYERS,
    "timm_backbone": {"backbone": "test_resnet"},
    "timm_wrapper": {"architecture": "test_resnet"},
    "vipllava": {"vision_feature_layer": (-2, -1)},
    "voxtral_encoder": {"intermediate_size": 128},
    "xclip_vision_model": {"mit_hidden_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zoedepth": {"bottleneck_features": 32},
    "zoedepth.backbone_config": _FOUR_LAYERS,
}
"""By the type of a configuration, or the type of the one that it is a part of and the name there."""
