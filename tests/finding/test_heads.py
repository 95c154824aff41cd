"""Attention heads: found by structure, and taken away exactly."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.core.inputs import Inputs, call
from shallower.core.trees import tensors
from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from tests.zoo import ZOO


def specimen(name: str) -> tuple[nn.Module, Inputs]:
    model, inputs = next(s for s in ZOO if s.name == name).build()
    model = model.double()
    if isinstance(inputs, dict):
        return model, {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    return model, inputs.double()


def head_sites(model: nn.Module, inputs: Inputs) -> Sites:
    # query heads of one key head, where they can be cut apart, are read by no plain layer
    return find_sites(model, inputs, kinds="heads").select(lambda site: len(site.consumers) > 0)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [t.clone() for t in tensors(call(model, inputs)) if t.is_floating_point() and t.dim() < 4]


def plan_of(sites: Sites, seed: int = 0) -> Plan:
    """Random heads of each site, at least one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for site in sites:
        kept = int(torch.randint(1, site.width, (), generator=generator))
        chosen.append(Entry.narrow(site, torch.randperm(site.width, generator=generator)[:kept]))
    return Plan(tuple(chosen))


# name of the specimen, sites, width, columns of the output projection that a channel has, numbers that follow
FOUND: list[tuple[str, int, int, int, set[str]]] = [
    ("bert", 2, 4, 8, set()),
    ("roberta", 2, 4, 8, set()),
    ("distilbert", 2, 4, 8, set()),
    ("albert", 1, 4, 8, set()),
    ("modernbert", 2, 4, 8, set()),
    ("gpt2", 2, 4, 8, {"split_size"}),
    ("gpt_neo", 2, 4, 8, {"num_heads"}),
    ("gpt_neox", 2, 4, 8, set()),
    ("gptj", 2, 4, 8, {"num_attention_heads"}),
    ("opt", 2, 4, 8, {"num_heads"}),
    ("phi", 2, 4, 8, set()),
    ("llama", 2, 2, 16, set()),
    ("llama_with_biases", 2, 2, 16, set()),
    ("qwen3", 2, 2, 16, set()),
    ("gemma2", 2, 2, 16, set()),
    ("glm", 2, 2, 16, set()),
    ("bart", 6, 4, 8, set()),
    ("whisper", 6, 4, 8, {"num_heads"}),
    ("vit", 2, 4, 8, set()),
    ("clip", 4, 4, 8, set()),
    ("timm_vit", 2, 4, 8, {"num_heads", "attn_dim"}),
    ("wav2vec2", 2, 4, 8, set()),
    ("t5", 3, 4, 8, {"n_heads"}),
    ("deberta_v2", 2, 4, 8, {"num_attention_heads"}),
]


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case[0])
def test_heads_are_found_and_taken_away_exactly(case: Any) -> None:
    name, count, width, block, attributes = case
    model, inputs = specimen(name)
    sites = head_sites(model, inputs)
    assert len(sites) == count, str(sites)
    for site in sites:
        assert (site.width, site.block) == (width, block)
        assert site.consumers
    assert {follower.attribute for site in sites for follower in site.followers} == attributes
    plan = plan_of(sites)
    small, simulated = apply(model, plan, inputs), simulate(model, plan)
    dense, wanted, result = (outputs(m, inputs) for m in (model, simulated, small))
    assert len(result) == len(wanted)
    for got, expected in zip(result, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(dense, wanted, strict=True))


def test_heads_are_listed_on_request_only_and_in_order() -> None:
    model, inputs = specimen("llama")
    assert [site.kind for site in find_sites(model, inputs)] == ["gated"] * 2
    assert [site.kind for site in find_sites(model, inputs, kinds=("hidden", "heads"))] == ["heads", "gated"] * 2


def test_heads_are_called_as_what_holds_their_projections() -> None:
    model, inputs = specimen("bert")
    assert head_sites(model, inputs).names[0] == "bert.encoder.layer.0.attention.self"


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
    small = apply(model, Plan(tuple(Entry.narrow(site, torch.tensor([0, 2, 3])) for site in sites)), inputs)
    again = head_sites(small, inputs)
    assert [site.width for site in again] == [3, 3]
    assert again[0].macs == sites[0].macs * 3 // 4
    assert again[0].cached_each == sites[0].cached_each == 16


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_a_language_model_with_fewer_heads_writes_the_same_with_and_without_cache(name: str) -> None:
    model, inputs = specimen(name)
    plan = plan_of(head_sites(model, inputs))
    assert isinstance(inputs, dict)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    both = (apply(model, plan, inputs), simulate(model, plan))
    written = [m.generate(**inputs, **options, use_cache=cache) for m in both for cache in (True, False)]
    assert all(torch.equal(text, written[0]) for text in written[1:])


@pytest.mark.parametrize(("name", "has_bias"), [("llama", False), ("gpt2", True)])
def test_a_refitted_output_projection_is_used(name: str, has_bias: bool) -> None:
    model, inputs = specimen(name)
    site = head_sites(model, inputs)[0]
    out = site.consumers[0]
    assert out.bias == has_bias
    weight = torch.randn(out.d_out, site.block, dtype=torch.float64)
    bias = torch.randn(out.d_out, dtype=torch.float64)
    plan = Plan((Entry.narrow(site, torch.tensor([1]), fit=Fit((weight,), (bias,))),))
    small = apply(model, plan, inputs)
    torch.testing.assert_close(outputs(small, inputs), outputs(simulate(model, plan), inputs), rtol=1e-10, atol=1e-10)
    fitted = small.get_submodule(out.name)
    assert torch.equal(torch.as_tensor(fitted.bias), bias)
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert lost == plan.params_saved


def test_a_fit_needs_a_layer_that_reads_the_heads_alone() -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(1, 3, 8)
    for site in find_sites(model, x, kinds=("heads", "stream")):
        with pytest.raises(PlanError, match="nothing can be fitted"):
            Entry.narrow(site, torch.tensor([0]), fit=Fit((), ()))


def test_no_head_at_all_and_another_model_are_refused() -> None:
    model, inputs = specimen("llama")
    site = head_sites(model, inputs)[0]
    with pytest.raises(PlanError, match="at least one"):
        Entry.narrow(site, torch.zeros(0, dtype=torch.int64))
    plan = Plan((Entry.narrow(site, torch.tensor([0])),))
    with pytest.raises(sh.ShallowerError, match=r"made for|shape"):
        apply(apply(model, plan, inputs), plan, inputs)


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
    plan = Plan(tuple(Entry.narrow(site, torch.tensor([0, 1, 3])) for site in head_sites(model, inputs)))
    small = apply(model, plan, inputs)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (6, 3)
    stock = hf.LlamaForCausalLM(small.config).double().eval()
    stock.load_state_dict(small.state_dict())
    torch.testing.assert_close(outputs(stock, inputs), outputs(small, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [([0, 1], [0, 1, 2]), ([0, 2],), ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])], ids=str)
def test_a_configuration_that_cannot_express_them_stays(kept: Any) -> None:
    model, inputs = llama(6, 6)
    sites = head_sites(model, inputs)  # uneven, not everywhere, or a number that does not divide the model's width
    plan = Plan(tuple(Entry.narrow(site, torch.tensor(own)) for site, own in zip(sites, kept, strict=False)))
    small = apply(model, plan, inputs)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (6, 6)


# ---------------------------------------------------------------------- attention written by hand


class ByHand(nn.Module):
    """softmax(q k^T) v in plain calls."""

    def __init__(self, heads: int = 4, order: str = "rows") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads, self.order = heads, order
        self.slopes = nn.Parameter(torch.randn(4, 1, 1))

    def split(self, x: Tensor) -> Tensor:
        if self.order == "interleaved":
            return x.view(*x.shape[:2], -1, self.heads).permute(0, 3, 1, 2)
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.order == "turned":
            q = q.flip(1)
        scale = math.sqrt(q.shape[-1]) if self.order == "counted" else 2
        scores = q @ k.transpose(-1, -2) / scale
        if self.order == "slopes":
            scores = scores + self.slopes
        z = (F.softmax(scores, -1) @ v).transpose(1, 2)
        z = z.reshape(*x.shape[:2], -1)
        if self.order == "gate":
            z = z * torch.sigmoid(self.k(x))
        return x + self.o(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["rows", "slopes", "gate", "counted"])
def test_attention_in_plain_calls_is_found(order: str) -> None:
    model, x = ByHand(order=order).double(), torch.randn(2, 5, 16).double()
    (site,) = head_sites(model, x)
    assert (site.width, site.consumers[0].name) == (4, "o")
    assert [(follower.attribute, follower.each) for follower in site.followers] == [("heads", 1)]
    apply(model, plan_of(Sites((site,))), x)


@pytest.mark.parametrize("order", ["interleaved", "turned"])
def test_heads_that_meet_in_another_order_are_none(order: str) -> None:
    model, x = ByHand(order=order).double(), torch.randn(2, 5, 16).double()
    for site in head_sites(model, x):
        apply(model, plan_of(Sites((site,))), x)
    if order == "turned":
        assert not head_sites(model, x)
