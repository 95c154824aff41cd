"""What a saved directory says of its stock class is what from_pretrained then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import shallower as sh
from shallower.saving.description import Stock
from shallower.saving.reading import read_description
from shallower.saving.stock.statement import RAN, settings_of

IDS = {"input_ids": torch.arange(10).reshape(2, 5)}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(vocab_size=50, intermediate_size=40, pad_token_id=0, **{**sizes, **changes})
    return hf.LlamaForCausalLM(config).eval()


def stock_after(model: nn.Module, directory: Path, *entries: sh.Entry) -> Stock:
    """What is said of the model after this surgery."""
    small = sh.apply(model, sh.Plan(entries), IDS)
    sh.save(small, directory)
    return read_description(directory).stock


def test_a_class_that_loads_the_result_is_named_and_gives_the_same(tmp_path: Path) -> None:
    model = llama()
    sites = sh.find_sites(model, IDS, kinds=("hidden", "heads", "stream"))
    halves = [sh.Entry.narrow(site, torch.arange(site.width // 2)) for site in sites]
    small = sh.apply(model, sh.Plan(tuple(halves)), IDS)
    sh.save(small, tmp_path / "out")
    stock = read_description(tmp_path / "out").stock
    assert str(stock) == "the stock class loads this: LlamaForCausalLM.from_pretrained"
    assert str(stock).lower() in (tmp_path / "out" / "README.md").read_text().lower()
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**IDS).logits, small(**IDS).logits, rtol=1e-6, atol=1e-6)


def refused_by(stock: Any, directory: Path) -> None:
    """The class alone, without the record of surgery, does not load what is there."""
    config = hf.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    with pytest.raises(RuntimeError):
        stock.from_pretrained(directory, config=config)


def test_a_width_of_one_layer_is_named_with_what_the_config_says(tmp_path: Path) -> None:
    model = llama()
    first = next(iter(sh.find_sites(model, IDS)))
    stock = stock_after(model, tmp_path / "out", sh.Entry.narrow(first, torch.arange(13)))
    assert "layers.0.mlp.gate_proj.weight` is 13 wide where the config says one width for all layers, 40" in stock.why
    refused_by(hf.LlamaForCausalLM, tmp_path / "out")


def test_a_number_that_the_class_also_computes_with_is_named(tmp_path: Path) -> None:
    """Gemma scales its embeddings by the root of the width: with the smaller one all shapes would fit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = hf.GemmaForCausalLM(hf.GemmaConfig(vocab_size=50, intermediate_size=40, head_dim=8, **sizes)).eval()
    stream = next(site for site in sh.find_sites(model, IDS, kinds=("stream",)))
    stock = stock_after(model, tmp_path / "out", sh.Entry.narrow(stream, torch.arange(16)))
    assert "with hidden_size = 16 in its config it gives other outputs" in stock.why


def test_an_activation_that_is_gone_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, n_inner=40, bos_token_id=1, eos_token_id=1
    )
    model = hf.GPT2LMHeadModel(config).eval()
    plan = sh.Plan.collapse(sh.find_sites(model, IDS))
    assert "mlp" in stock_after(model, tmp_path / "out", *plan.entries).why


def test_of_other_models_nothing_is_said(tmp_path: Path) -> None:
    sh.save(nn.Linear(2, 2), tmp_path / "out")
    assert str(read_description(tmp_path / "out").stock) == ""


def test_settings_are_the_plain_values_of_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    found = settings_of(model)
    assert found["0", "in_features"] == 3
    assert found["1", "p"] == 0.5
    assert ("0", "training") not in found


def test_weights_that_are_tied_here_and_not_there_are_named(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    sh.save(model, tmp_path / "out")
    assert "are two tensors in its class and one in the model" in read_description(tmp_path / "out").stock.why


def test_what_is_said_of_a_forward_with_other_numbers_is_what_the_class_does(tmp_path: Path) -> None:
    """Phi 3 reads the number of heads from its config in its forward, which surgery may have to write anew."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Phi3Config(vocab_size=50, intermediate_size=40, pad_token_id=0, eos_token_id=1, **sizes)
    model = hf.Phi3ForCausalLM(config).eval()
    (site,) = sh.find_sites(model, IDS, kinds=("heads",))
    small = sh.apply(model, sh.Plan((sh.Entry.narrow(site, torch.arange(1)),)), IDS)
    sh.save(small, tmp_path / "out")
    if read_description(tmp_path / "out").stock.why:
        refused_by(hf.Phi3ForCausalLM, tmp_path / "out")
    else:
        again = hf.Phi3ForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**IDS).logits, small(**IDS).logits)


def test_a_model_remembers_that_its_class_has_answered_alike() -> None:
    model = llama()
    entries = [sh.Entry.narrow(site, torch.arange(20)) for site in sh.find_sites(model, IDS)]
    assert RAN in vars(sh.apply(model, sh.Plan(tuple(entries)), IDS))
    assert RAN not in vars(sh.apply(model, sh.Plan((entries[0],)), IDS))
