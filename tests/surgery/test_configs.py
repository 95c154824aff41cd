"""A config follows new widths where, and only where, its stock class then has the layers of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from benchmarks.zoo import KINDS, together
from shallower.core.inputs import call
from shallower.core.trees import tensors
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def language_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=40)).eval()
    if name == "llama":
        config = hf.LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=40)
        return hf.LlamaForCausalLM(config).eval()
    if name == "phi3":
        return hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, intermediate_size=40, pad_token_id=0, eos_token_id=1)).eval()
    if name == "gpt2":
        config = hf.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
        )
        return hf.GPT2LMHeadModel(config).eval()
    bart = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return hf.BartModel(hf.BartConfig(vocab_size=50, d_model=16, max_position_embeddings=32, **bart, **heads)).eval()


IDS = {"input_ids": torch.arange(10).reshape(2, 5)}


@pytest.mark.parametrize(
    ("name", "key"),
    [("bert", "intermediate_size"), ("llama", "intermediate_size"), ("phi3", "intermediate_size"), ("gpt2", "n_inner")],
)
def test_a_uniformly_narrower_model_has_the_width_in_its_configuration_and_loads_in_its_class(name, key):
    model = language_model(name)
    plan = Plan(tuple(Entry.narrow(site, torch.arange(24)) for site in find_sites(model, IDS)))
    small = apply(model, plan, IDS)
    assert getattr(small.config, key) == 24
    assert getattr(model.config, key) in (40, None)
    fresh = type(model)(small.config).eval()
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**IDS)[0], small(**IDS)[0])


def test_encoder_and_decoder_have_widths_of_their_own():
    model = language_model("bart")
    sites = find_sites(model, IDS)
    narrow = Plan(tuple(Entry.narrow(s, torch.arange(24)) for s in sites if s.name.startswith("decoder")))
    config = apply(model, narrow, IDS).config
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (40, 24)


@pytest.mark.parametrize("widths", [(24, 20), (24, 40)])
def test_a_configuration_that_cannot_tell_the_widths_stays(widths):
    model = language_model("bert")
    entries = [Entry.narrow(s, torch.arange(w)) for s, w in zip(find_sites(model, IDS), widths, strict=True)]
    assert apply(model, Plan(tuple(entries)), IDS).config.intermediate_size == 40


def test_a_configuration_stays_where_a_bias_was_added():
    model = language_model("llama")
    sites = find_sites(model, IDS)
    plan = Plan(tuple(Entry.narrow(s, torch.arange(24), torch.ones(40)) for s in sites))
    assert apply(model, plan, IDS).config.intermediate_size == 40


def test_a_number_that_also_sizes_other_layers_stays() -> None:
    """Llama 4: the width of the dense layers is that of the routed experts, too."""
    torch.manual_seed(0)
    config = hf.Llama4TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2, interleave_moe_layer_step=1,
        moe_layers=[1], pad_token_id=0,
    )  # fmt: skip
    model = hf.Llama4ForCausalLM(config).eval()
    sites = find_sites(model, IDS)
    assert sites
    for width in {site.width for site in sites}:
        chosen = [site for site in sites if site.width == width]
        small = apply(model, Plan(tuple(Entry.narrow(site, torch.arange(24)) for site in chosen)), IDS)
        stock = type(model)(small.config)
        shapes = {name: p.shape for name, p in stock.named_parameters()}
        experts = {name: p.shape for name, p in small.named_parameters() if "experts" in name and p.dim() == 3}
        assert experts
        assert all(shapes[name] == shape for name, shape in experts.items())


def test_a_width_that_another_number_has_by_chance_does_not_block_the_change() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = hf.BertForMaskedLM(config).eval()
    sites = [site for site in find_sites(model, IDS) if site.name.startswith("bert.encoder")]
    assert len(sites) == 2
    small = apply(model, Plan(tuple(Entry.narrow(site, torch.arange(8)) for site in sites)), IDS)
    assert (small.config.intermediate_size, small.config.hidden_size) == (8, 16)


# by the name of the specimen, what of its config follows where half of everything is taken
FOLLOWING: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 19},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_inner": 19},
    "llama": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 19},
    "vit": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 19},
    "stablelm": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    "modernbert": {"hidden_size": 16, "num_attention_heads": 2},
    "t5_v1_1": {"num_heads": 2, "d_ff": 19},
    "swin": {"embed_dim": 8},
    "convnext": {},
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_with_half_of_everything_the_stock_class_is_the_model(name: str) -> None:
    model, inputs = next(s for s in ZOO if s.name == name).build()
    small = apply(model, Plan(tuple(together(model, find_sites(model, inputs, kinds=KINDS)))), inputs)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for key, number in FOLLOWING[name].items():
        assert getattr(small.config, key) == number
    fresh = type(small)(small.config).eval()
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        for expected, found in zip(tensors(call(small, inputs)), tensors(call(fresh, inputs)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_size_of_heads_that_the_config_left_open_is_said() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 40}
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    (stream,) = find_sites(model, IDS, kinds=("stream",))
    config = apply(model, Plan((Entry.narrow(stream, torch.arange(0, 32, 2)),)), IDS).config
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (16, 8, 4)


def test_fewer_heads_are_not_taken_for_smaller_ones() -> None:
    """The size of ViT's heads is a number that its class asks for; their number changes the same shapes."""
    model, inputs = next(s for s in ZOO if s.name == "vit").build()
    sites = find_sites(model, inputs, kinds=("heads",))
    config = apply(model, Plan(tuple(Entry.narrow(site, torch.arange(2)) for site in sites)), inputs).config
    assert (config.num_attention_heads, config.head_dim, config.hidden_size) == (2, 8, 32)


def test_configs_of_parts_follow_too() -> None:
    """T5 keeps a copy of its config for each stack."""
    model, inputs = next(s for s in ZOO if s.name == "t5_v1_1").build()
    sites = [site for site in find_sites(model, inputs) if "DenseReluDense" in site.name]
    small = apply(model, Plan(tuple(Entry.narrow(site, torch.arange(8)) for site in sites)), inputs)
    assert {part.config.d_ff for part in (small, small.encoder, small.decoder)} == {8}


def test_configs_within_the_config_follow_each_by_itself() -> None:
    model, inputs = next(s for s in ZOO if s.name == "clip").build()
    sites = [site for site in find_sites(model, inputs) if site.name.startswith("vision_model")]
    small = apply(model, Plan(tuple(Entry.narrow(site, torch.arange(8)) for site in sites)), inputs)
    before = model.config.text_config.intermediate_size
    assert small.config.vision_config.intermediate_size == 8
    assert small.config.text_config.intermediate_size == before
    assert small.vision_model.config.intermediate_size == 8


def test_of_a_model_without_numbers_the_operations_are_compared() -> None:
    model = language_model("llama").to("meta")
    ids = {"input_ids": IDS["input_ids"].to("meta")}
    halves = [Entry.narrow(site, torch.arange(20)) for site in find_sites(model, ids)]
    assert apply(model, Plan(tuple(halves)), ids).config.intermediate_size == 20


def test_a_model_within_another_has_its_config_follow() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = language_model("bert")

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.body(input_ids).logits
            return logits * 2

    model = Wrapped().eval()
    entries = [Entry.narrow(site, torch.arange(24)) for site in find_sites(model, IDS)]
    small = apply(model, Plan(tuple(entries)), IDS)
    assert small.body.config.intermediate_size == 24
