"""Small models whose saved directories are attacked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import shallower as sh
from shallower.app.models import load_model

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32}
IDS = torch.arange(3, 23).view(2, 10)


class Own(nn.Module):
    """A functional activation, a BatchNorm, a tied weight, a convolution in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.up, self.norm, self.down = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 8)
        self.head, self.twin = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.twin.weight = self.head.weight
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3)) + self.shift
        return self.twin(self.head(self.down(F.relu(self.norm(self.up(x))))))


IMAGES = torch.randn(2, 3, 4, 4)


def own() -> nn.Module:
    torch.manual_seed(0)
    model = Own().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    (site,) = sh.find_sites(model, IMAGES).select("up")
    result: nn.Module = sh.apply(model, sh.Plan((sh.Entry.narrow(site, torch.arange(9)),)), IMAGES)
    return result


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    sites = sh.find_sites(model, IDS).select(lambda site: site.kind == "gated")
    return sh.apply(model, sh.Plan.collapse(sites[:1]), IDS)


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, num_key_value_heads=2))


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=8)
    return transformers.Gemma3ForCausalLM(config)


def jamba() -> Any:
    config = transformers.JambaConfig(
        **TEXT, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1
    )
    return transformers.JambaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        dim=16, n_heads=2, n_layers=1, hidden_dim=32, vocab_size=40, sinusoidal_pos_embds=True
    )
    return transformers.DistilBertModel(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=60,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperModel(config)


def swin() -> Any:
    return transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=32))


def detr() -> Any:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        ),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    return transformers.DetrForObjectDetection(config)


def timm_vit() -> nn.Module:
    return load_model("timm:test_vit?num_classes=3&img_size=32", pretrained=False).model
