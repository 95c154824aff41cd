"""Configs follow layers that go, where their class then makes the same."""

from __future__ import annotations

from pathlib import Path

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
