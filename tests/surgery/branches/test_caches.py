"""Models whose attention was dropped in some layers generate the same with a KV cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shallower as sh
from shallower.recording.tracing import trace_forward

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "num_hidden_layers": 4, "pad_token_id": 0,
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def gemma() -> Any:
    config = transformers.Gemma2Config(**SMALL, query_pre_attn_scalar=4, sliding_window=6)
    return transformers.Gemma2ForCausalLM(config)


def jamba() -> Any:
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = transformers.JambaConfig(**sizes, **periods, num_experts=2, mamba_d_state=4, use_mamba_kernels=False)
    return transformers.JambaForCausalLM(config)


def bart() -> Any:
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 32, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 3}
    config = transformers.BartConfig(**sizes, **heads, max_position_embeddings=64, decoder_start_token_id=1)
    return transformers.BartForConditionalGeneration(config)


def generated(model: Any, ids: torch.Tensor, cached: bool) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    lengths = {"max_new_tokens": 12, "min_new_tokens": 12}
    found: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, use_cache=cached, **lengths
    )
    return found


@pytest.mark.parametrize(
    ("make", "dropped"),
    [
        (llama, ("model.layers.0.self_attn:branch", "model.layers.1.self_attn:branch")),
        (llama, ("model.layers.1.self_attn:branch", "model.layers.0:layer")),
        (gemma, ("model.layers.0.self_attn:branch", "model.layers.1.self_attn:branch")),
        (bart, ("model.decoder.layers.0.self_attn:branch", "model.decoder.layers.1.encoder_attn:branch")),
        (jamba, ("model.layers.1:layer",)),
    ],
)
def test_the_cache_still_counts_tokens(make: Any, dropped: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(3, 32, (2, 9))
    inputs = {"input_ids": ids}
    if make is bart:
        inputs["decoder_input_ids"] = ids
    sites = sh.find_sites(model, inputs, kinds="branch")
    plan = sh.Plan(tuple(sh.Entry.drop(sites[name]) for name in dropped))
    small = sh.apply(model, plan, inputs)
    before, after = trace_forward(model, inputs).kv, trace_forward(small, inputs).kv
    assert before is not None
    assert after is not None
    assert before - after == 4 * sum(entry.site.cached_each for entry in plan.entries)
    sh.save(small, tmp_path / "small")
    for result in (small, sh.load(tmp_path / "small").eval()):
        result.set_attn_implementation("eager")  # which needs a mask of the right length
        assert torch.equal(generated(result, ids, True), generated(result, ids, False))
