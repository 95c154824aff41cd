"""Configs follow layers that go, where their class then makes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shallower as sh

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "num_hidden_layers": 4, "pad_token_id": 0,
}  # fmt: skip


def llama() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def gemma() -> torch.nn.Module:
    config = transformers.Gemma2Config(**SMALL, query_pre_attn_scalar=4, sliding_window=4)
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, gemma])
def test_a_stock_class_with_fewer_layers(tmp_path: Path, make: object) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(1, 32, (2, 9))
    sites = sh.find_sites(model, {"input_ids": ids}, kinds="branch")
    plan = sh.Plan((sh.Entry.drop(sites["model.layers.0:layer"]), sh.Entry.drop(sites["model.layers.2:layer"])))
    small = sh.apply(model, plan, {"input_ids": ids})
    assert (small.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 4)
    if make is gemma:
        assert small.config.layer_types == [model.config.layer_types[i] for i in (1, 3)]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    sh.save(small, tmp_path / "small")
    stock = type(model).from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(stock(ids).logits, small(ids).logits)
    torch.testing.assert_close(sh.load(tmp_path / "small").eval()(ids).logits, small(ids).logits)
    kept = small.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(kept, small.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def distilbert() -> torch.nn.Module:
    sizes = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_heads": 4, "pad_token_id": 0}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes, n_layers=3))


def dinov2() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "mlp_ratio": 2}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, num_hidden_layers=3))


@pytest.mark.parametrize(
    ("make", "names", "inputs"),
    [
        (distilbert, "distilbert.transformer.layer", {"input_ids": torch.ones(2, 5, dtype=torch.long)}),
        (dinov2, "dinov2.encoder.layer", {"pixel_values": torch.randn(2, 3, 16, 16)}),
    ],
)
def test_modules_that_hold_their_number_and_stages_named_after_layers(
    make: Any, names: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    model = make().eval()
    sites = sh.find_sites(model, inputs, kinds="branch")
    small = sh.apply(model, sh.Plan((sh.Entry.drop(sites[f"{names}.1:layer"]),)), inputs)
    assert len(small.get_submodule(names)) == 2
    sh.save(small, tmp_path / "small")
    stock = type(model).from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(stock(**inputs).logits, small(**inputs).logits)


def test_encoder_and_decoder_are_told_apart() -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 32, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    config = transformers.BartConfig(**sizes, **heads, max_position_embeddings=32, decoder_start_token_id=0)
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(1, 32, (2, 9))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    sites = sh.find_sites(model, inputs, kinds="branch")
    small = sh.apply(model, sh.Plan((sh.Entry.drop(sites["model.decoder.layers.0:layer"]),)), inputs)
    assert (small.config.encoder_layers, small.config.decoder_layers) == (2, 1)
