"""Models whose weights Accelerate has put elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shallower.errors import ModelError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze
from shallower.modules.offloading import held_bytes, is_mapped, is_offloaded, weightless, with_mapped_weights
from shallower.saving.checkpoint import load, save
from shallower.surgery.applying import apply

Offload = Callable[[LlamaForCausalLM, Path], nn.Module]


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (8, 16), generator=generator)} for _ in range(count)]


def by_loading(model: LlamaForCausalLM, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "whole")
    where = {"": "disk"}
    offloaded: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder / "whole", device_map=where, offload_folder=folder / "offload"
    )
    return offloaded.eval()


def to_disk(model: LlamaForCausalLM, folder: Path) -> nn.Module:
    offloaded: nn.Module = disk_offload(model, folder / "offload")
    return offloaded


def to_cpu(model: LlamaForCausalLM, folder: Path) -> nn.Module:  # noqa: ARG001
    offloaded: nn.Module = cpu_offload(model, torch.device("cpu"))
    return offloaded


WAYS = pytest.mark.parametrize("offload", [by_loading, to_disk, to_cpu])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batches()[0]).logits
    return found


@WAYS
def test_an_offloaded_model_is_squeezed_as_one_in_memory(offload: Offload, tmp_path: Path) -> None:
    model, offloaded = llama(), offload(llama(), tmp_path)
    assert next(offloaded.parameters()).is_meta
    results = []
    for each in (model, offloaded):
        sites = find_sites(each, batches()[0])
        plan = squeeze(each, sites, batches(), "params:85%", options=SqueezeOptions(round_to=4))
        results.append((plan, apply(each, plan, batches()[0])))
    (plan, small), (other, found) = results
    assert plan.to_json() == other.to_json()
    torch.testing.assert_close(logits(small), logits(found))
    assert not is_offloaded(found)


@WAYS
def test_the_offloaded_model_stays_as_it_was(offload: Offload, tmp_path: Path) -> None:
    offloaded = offload(llama(), tmp_path)
    before = logits(offloaded)
    sites = find_sites(offloaded, batches()[0])
    apply(offloaded, squeeze(offloaded, sites, batches(), "params:85%", uniform=True), batches()[0])
    assert is_offloaded(offloaded)
    assert all(p.is_meta for p in offloaded.parameters())
    torch.testing.assert_close(logits(offloaded), before)


@pytest.mark.parametrize("offload", [by_loading, to_disk])
def test_what_is_mapped_takes_no_memory_and_is_never_written(offload: Offload, tmp_path: Path) -> None:
    plain = with_mapped_weights(offload(llama(), tmp_path))
    assert held_bytes(plain) == 0
    before = {name: p.clone() for name, p in plain.named_parameters()}
    small = apply(plain, squeeze(plain, find_sites(plain, batches()[0]), batches(), "params:85%"), batches()[0])
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert any(is_mapped(p) for p in small.parameters())
    assert not is_mapped(small.model.layers[0].mlp.down_proj.weight)


def test_tied_embeddings_are_tied_again(tmp_path: Path) -> None:
    model = llama(tied=True)
    plain = with_mapped_weights(by_loading(model, tmp_path))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(model))


def test_the_result_is_saved_and_loaded(tmp_path: Path) -> None:
    offloaded = by_loading(llama(), tmp_path)
    plan = squeeze(offloaded, find_sites(offloaded, batches()[0]), batches(), "params:85%")
    small = apply(offloaded, plan, batches()[0])
    save(small, tmp_path / "small")
    torch.testing.assert_close(logits(load(tmp_path / "small")), logits(small))


def test_a_model_in_memory_is_left_alone() -> None:
    model = llama()
    assert with_mapped_weights(model) is model


def test_a_weight_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    offloaded = to_disk(llama(), tmp_path)
    module = offloaded.get_submodule("model.layers.1.mlp.up_proj")
    vars(module)["_hf_hook"].offload = False
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        with_mapped_weights(offloaded)


def test_copies_without_weights_have_the_same_parameters_and_buffers_on_the_meta_device() -> None:
    norm = nn.BatchNorm1d(3)
    norm.bias.requires_grad_(False)
    empty = copy.deepcopy(norm, weightless([*norm.parameters(), *norm.buffers()]))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert [p.requires_grad for p in empty.parameters()] == [True, False]
    assert empty.state_dict().keys() == norm.state_dict().keys()
