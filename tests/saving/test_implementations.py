"""Every part of a Transformers model computes attention and experts as it did when it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import shallower as sh
from shallower.errors import CheckpointError
from shallower.saving.implementations import Implementations, implementations_of_parts
from shallower.saving.sources import source_of
from tests.saving.sizes import ENCODER_DECODER, SMALL

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def detr() -> Any:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage2"]),
        **ENCODER_DECODER,
        num_queries=5,
    )
    return transformers.DetrForObjectDetection(config).eval()


def depth_anything() -> Any:
    stages = ["stage1", "stage2"]
    backbone = transformers.Dinov2Config(
        **{**SMALL, "num_hidden_layers": 2}, image_size=28, out_features=stages, reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
    )
    return transformers.DepthAnythingForDepthEstimation(config).eval()


def trocr() -> Any:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**SMALL, image_size=32),
        transformers.TrOCRConfig(
            d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=40
        ),
    )
    return transformers.VisionEncoderDecoderModel(config).eval()


@pytest.mark.parametrize("make", [detr, depth_anything, trocr], ids=lambda make: make.__name__)
def test_each_part_is_loaded_with_its_own_attention(make: Any, tmp_path: Path) -> None:
    model = make()
    assert len({attention for attention, _ in implementations_of_parts(model).values()}) == 2
    sh.save(model, tmp_path / "out")
    assert implementations_of_parts(sh.load(tmp_path / "out")) == implementations_of_parts(model)


def test_experts_are_loaded_with_their_implementation(tmp_path: Path) -> None:
    model = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SMALL, vocab_size=40, num_experts=2, moe_intermediate_size=8)
    )
    model.set_experts_implementation("eager")
    sh.save(model, tmp_path / "out")
    assert implementations_of_parts(sh.load(tmp_path / "out")) == implementations_of_parts(model)


def test_a_model_of_one_kind_of_attention_names_it_once() -> None:
    model = transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation="eager"))
    assert source_of(model) == "transformers:BertModel?attention=eager"
    assert Implementations.of(model).options() == {"attention": "eager"}


def test_attention_that_no_config_expresses_is_refused_when_saved(tmp_path: Path) -> None:
    model = trocr()
    decoder = model.decoder.model.decoder
    decoder.config = transformers.TrOCRConfig(**decoder.config.to_dict())
    decoder.config._attn_implementation_internal = "sdpa"
    with pytest.raises(CheckpointError, match=r"decoder\.model\.decoder: attention and experts are computed by"):
        sh.save(model, tmp_path / "out")


def test_infinite_numbers_in_a_config_are_read_again(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=1, vocab_size=40
    )
    assert config.time_step_limit[1] == float("inf")
    model = transformers.Mamba2ForCausalLM(config).eval()
    sh.save(model, tmp_path / "out")
    loaded: Any = sh.load(tmp_path / "out")
    assert list(loaded.config.time_step_limit) == list(config.time_step_limit)
    ids = torch.arange(3, 13).view(1, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
