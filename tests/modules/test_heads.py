"""Attention heads: found by structure, and taken away exactly."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.inputs import Inputs, call
from shallower.core.trees import tensors
from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.modules.edits import edits, perform, replay
from shallower.modules.heads import narrow, without_heads
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import steps
from shallower.sites import Heads, LinearMap, Site, Sites
from shallower.sites.heads import columns, narrowed, rows
from shallower.surgery.configs import follow_heads
from shallower.surgery.simulation import impose_heads
from tests.zoo import ZOO


def take_away(model: nn.Module, entry: Entry) -> None:
    """Narrow the model as the entry says, with its fit where it has one."""
    fitted = () if entry.fit is None else (entry.fit.consumers[0], entry.fit.biases[0])
    for edit in without_heads(model, entry.site, entry.kept, *fitted):
        perform(model, edit)


def specimen(name: str) -> tuple[nn.Module, Inputs]:
    model, inputs = next(s for s in ZOO if s.name == name).build()
    model = model.double()
    if isinstance(inputs, dict):
        return model, {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    return model, inputs.double()


def head_sites(model: nn.Module, inputs: Inputs) -> Sites:
    return find_sites(model, inputs, kinds=("hidden", "heads")).select(lambda site: site.kind == "heads")


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [t.clone() for t in tensors(call(model, inputs)) if t.is_floating_point() and t.dim() < 4]


def entries(sites: Sites, seed: int = 0) -> list[Entry]:
    """Random heads of each site, at least one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for site in sites:
        kept = int(torch.randint(1, site.width, (), generator=generator))
        chosen.append(Entry.narrow(site, torch.randperm(site.width, generator=generator)[:kept]))
    return chosen


# name of the specimen, sites, width, queries per group, how packed, attributes that count
FOUND: list[tuple[str, int, int, int, str, set[str]]] = [
    ("bert", 2, 4, 1, "", {"num_attention_heads", "all_head_size"}),
    ("roberta", 2, 4, 1, "", {"num_attention_heads", "all_head_size"}),
    ("distilbert", 2, 4, 1, "", {"n_heads"}),
    ("albert", 1, 4, 1, "", {"num_attention_heads", "all_head_size"}),
    ("modernbert", 2, 4, 1, "blocks", set()),
    ("gpt2", 2, 4, 1, "blocks", {"num_heads", "split_size"}),
    ("gpt_neo", 2, 4, 1, "", {"num_heads"}),
    ("gpt_neox", 2, 4, 1, "heads", set()),
    ("gptj", 2, 4, 1, "", {"num_attention_heads"}),
    ("opt", 2, 4, 1, "", {"num_heads"}),
    ("phi", 2, 4, 1, "", set()),
    ("llama", 2, 2, 2, "", set()),
    ("llama_with_biases", 2, 2, 2, "", set()),
    ("qwen3", 2, 2, 2, "", set()),
    ("gemma2", 2, 2, 2, "", set()),
    ("glm", 2, 2, 2, "", set()),
    ("bart", 6, 4, 1, "", {"num_heads"}),
    ("whisper", 6, 4, 1, "", {"num_heads"}),
    ("vit", 2, 4, 1, "", {"num_attention_heads"}),
    ("clip", 4, 4, 1, "", {"num_heads"}),
    ("timm_vit", 2, 4, 1, "blocks", {"num_heads", "attn_dim"}),
    ("wav2vec2", 2, 4, 1, "", {"num_heads"}),
]


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case[0])
def test_heads_are_found_and_taken_away_exactly(case: Any) -> None:
    name, count, width, each, packed, attributes = case
    model, inputs = specimen(name)
    sites = head_sites(model, inputs)
    assert len(sites) == count, str(sites)
    for site in sites:
        assert site.heads is not None
        assert (site.width, site.heads.queries_per_group, site.heads.packed) == (width, each, packed)
        assert {attribute for attribute, _ in site.heads.counts} == attributes
    small, simulated = copy.deepcopy(model), copy.deepcopy(model)
    for entry in entries(sites):
        take_away(small, entry)
        impose_heads(simulated, entry)
    dense, wanted, result = (outputs(m, inputs) for m in (model, simulated, small))
    assert len(result) == len(wanted)
    for got, expected in zip(result, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(dense, wanted, strict=True))


SKIPPED = [
    ("t5", "SelfAttention", "differs from head to head"),
    ("mpnet", "attention", "differs from head to head"),
    ("mpt", "attn", "differs from head to head"),
    ("deberta_v2", "attention.self", "not divided into several heads"),
    ("beit", "attention", "differs from head to head"),
    ("swin", "attention", "differs from head to head"),
    ("timm_swin", "attn", "differs from head to head"),
    ("falcon", "self_attention", "one key-value head"),
    ("olmo2", "self_attn", "not divided into several heads"),
    ("phi3", "self_attn", "does not follow"),
    ("torchvision_vit", "self_attention", "MultiheadAttention"),
    ("torch_encoder", "self_attn", "MultiheadAttention"),
    ("timm_eva02_tiny", "attn", "without calling their module"),
]


@pytest.mark.parametrize("case", SKIPPED, ids=lambda case: case[0])
def test_heads_that_cannot_be_taken_away_are_skipped_with_the_reason(case: Any) -> None:
    name, where, why = case
    model, inputs = specimen(name)
    sites = find_sites(model, inputs, kinds=("hidden", "heads"))
    assert not [site for site in sites if site.kind == "heads"]
    assert any(where in key and why in reason for key, reason in sites.skipped.items()), sites.skipped


def test_heads_are_listed_on_request_only_and_in_order() -> None:
    model, inputs = specimen("llama")
    assert [site.kind for site in find_sites(model, inputs)] == ["gated"] * 2
    assert [site.kind for site in find_sites(model, inputs, kinds=("hidden", "heads"))] == ["heads", "gated"] * 2


def test_finding_heads_leaves_the_model_as_it_was() -> None:
    model, inputs = specimen("timm_vit")
    before = copy.deepcopy(model.state_dict())
    numbers = {name: dict(vars(module)) for name, module in model.named_modules()}
    head_sites(model, inputs)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == numbers


def test_fewer_heads_are_found_again() -> None:
    model, inputs = specimen("gpt2")
    sites = head_sites(model, inputs)
    for site in sites:
        narrow(model, site, torch.tensor([0, 2, 3]))
    again = head_sites(model, inputs)
    assert [site.width for site in again] == [3, 3]
    assert list(again) == [narrowed(site, 3) for site in sites]
    assert again[0].macs == sites[0].macs * 3 // 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_a_language_model_with_fewer_heads_writes_the_same_with_and_without_cache(name: str) -> None:
    model, inputs = specimen(name)
    simulated = copy.deepcopy(model)
    for entry in entries(head_sites(model, inputs)):
        take_away(model, entry)
        impose_heads(simulated, entry)
    assert isinstance(inputs, dict)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    written = [m.generate(**inputs, **options, use_cache=cache) for m in (model, simulated) for cache in (True, False)]
    assert all(torch.equal(text, written[0]) for text in written[1:])


def test_what_was_done_can_be_done_again_to_a_fresh_model() -> None:
    model, inputs = specimen("timm_vit")
    fresh, _ = specimen("timm_vit")
    for entry in entries(head_sites(model, inputs)):
        take_away(model, entry)
    replay(fresh, edits(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, inputs)[0], outputs(model, inputs)[0])


def test_a_refitted_output_projection_is_used() -> None:
    model, inputs = specimen("llama")
    site = head_sites(model, inputs)[0]
    out = site.consumers[0]
    assert site.heads is not None
    weight = torch.randn(out.d_out, site.heads.block, dtype=torch.float64)
    bias = torch.randn(out.d_out, dtype=torch.float64)
    entry = Entry.narrow(site, torch.tensor([1]), fit=Fit((weight,), (bias,)))
    simulated = copy.deepcopy(model)
    take_away(model, entry)
    impose_heads(simulated, entry)
    torch.testing.assert_close(outputs(model, inputs), outputs(simulated, inputs), rtol=1e-10, atol=1e-10)
    assert torch.equal(model.get_submodule(out.name).weight, weight)
    assert torch.equal(model.get_submodule(out.name).bias, bias)


def test_no_head_at_all_and_another_model_are_refused() -> None:
    model, inputs = specimen("llama")
    site = head_sites(model, inputs)[0]
    with pytest.raises(PlanError, match="at least one"):
        narrow(model, site, torch.zeros(0, dtype=torch.int64))
    narrow(model, site, torch.tensor([0]))
    with pytest.raises(PlanError, match="made for"):
        narrow(model, site, torch.tensor([0]))


def llama(heads: int, groups: int) -> tuple[nn.Module, Inputs]:
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).double().eval(), {"input_ids": torch.randint(3, 40, (2, 6))}


def test_a_configuration_that_can_express_fewer_heads_follows_and_builds_the_stock_model() -> None:
    model, inputs = llama(8, 4)
    made = [Entry.narrow(site, torch.tensor([0, 1, 3])) for site in head_sites(model, inputs)]
    for entry in made:
        take_away(model, entry)
    follow_heads(model, steps(made))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 3)
    stock = hf.LlamaForCausalLM(model.config).double().eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(stock, inputs), outputs(model, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [([0, 1], [0, 1, 2]), ([0, 2],), ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])], ids=str)
def test_a_configuration_that_cannot_express_them_stays(kept: Any) -> None:
    model, inputs = llama(6, 6)
    sites = head_sites(model, inputs)  # uneven, not everywhere, or a number that does not divide the model's width
    made = [Entry.narrow(site, torch.tensor(own)) for site, own in zip(sites, kept, strict=False)]
    for entry in made:
        take_away(model, entry)
    follow_heads(model, steps(made))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 6)


# ---------------------------------------------------------------------- attention written by hand


class ByHand(nn.Module):
    """softmax(q k^T) v in plain calls."""

    def __init__(self, heads: int = 4, order: str = "rows", gate: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads, self.order, self.gate = heads, order, gate
        self.slopes = nn.Parameter(torch.randn(4, 1, 1))

    def split(self, x: Tensor) -> Tensor:
        if self.order == "interleaved":
            return x.view(*x.shape[:2], 4, self.heads).permute(0, 3, 1, 2)
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.order == "turned":
            q = q.flip(1)
        scores = q @ k.transpose(-1, -2) / 2
        if self.order == "slopes":
            scores = scores + self.slopes
        z = (F.softmax(scores, -1) @ v).transpose(1, 2)
        z = z.reshape(*x.shape[:2], -1)
        if self.order == "gate":
            z = z * torch.sigmoid(self.k(x))
        return x + self.o(z)  # type: ignore[no-any-return]


def test_attention_in_plain_calls_is_found() -> None:
    (site,) = head_sites(ByHand().double(), torch.randn(2, 5, 16).double())
    assert (site.width, site.maps[0].name, site.consumers[0].name) == (4, "q", "o")
    assert site.heads is not None
    assert site.heads.counts == (("heads", 1),)


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ("interleaved", "third dimension from the end"),
        ("turned", "side by side|another order"),
        ("slopes", "differs from head to head"),
        ("gate", "also read|stands before"),
    ],
)
def test_attention_whose_heads_do_not_go_together_is_skipped(order: str, why: str) -> None:
    sites = find_sites(ByHand(order=order), torch.randn(2, 5, 16), kinds=("hidden", "heads"))
    assert not [site for site in sites if site.kind == "heads"]
    assert any(re.search(why, reason) for reason in sites.skipped.values()), sites.skipped


# ---------------------------------------------------------------------- rows and columns


@given(width=st.integers(2, 6), each=st.integers(1, 3), dim=st.integers(1, 4), packed=st.sampled_from(["", "blocks"]))
def test_rows_of_narrowed_heads_are_all_rows_of_the_smaller_maps(width: int, each: int, dim: int, packed: Any) -> None:
    sizes = [width * each * dim, width * dim, width * dim]
    total = sum(sizes)

    def made(name: str, d_out: int) -> LinearMap:
        return LinearMap("qkv" if packed else name, "linear", 8, total if packed else d_out, False, 1)

    starts = [0, sizes[0], sizes[0] + sizes[1]] if packed else [0, 0, 0]
    heads = Heads(
        "attn",
        *(made(name, size) for name, size in zip("qkv", sizes, strict=True)),
        dim,
        dim,
        each,
        packed,
        (starts[0], each * dim, each * dim),
        (starts[1], dim, dim),
        (starts[2], dim, dim),
    )
    out = LinearMap("o", "linear", sizes[0], 8, False, 1)
    site = Site("attn", "heads", width, None, (out,), None, heads=heads)
    fewer = narrowed(site, width - 1)
    kept = torch.arange(width)[1:]
    for m in fewer.maps[:-1]:
        assert len(rows(heads, kept)[m.name]) == m.d_out
        everything = rows(fewer.heads, torch.arange(width - 1))[m.name]  # type: ignore[arg-type]
        assert torch.equal(everything, torch.arange(m.d_out))
    assert len(columns(heads, kept)) == fewer.consumers[0].d_in
