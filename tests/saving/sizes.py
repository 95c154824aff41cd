"""Sizes of small random models of Transformers."""

from __future__ import annotations

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 20}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
ENCODER_DECODER = {
    **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
}
