"""What a plan promises is what goes: params, MACs, bytes and KV cache after surgery are those counted before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.core.inputs import Inputs
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.planning.costs import cost_after
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply

TYPES = [torch.float64, torch.float32, torch.bfloat16]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.PReLU(16), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)
    )


def check(model: nn.Module, plan: Plan, inputs: Inputs) -> None:
    before = cost_of(model, inputs)
    small = apply(model, plan, inputs)
    assert cost_after(plan, before, model) == cost_of(small, inputs)


def narrowed(sites: Sites) -> Plan:
    return Plan(tuple(Entry.narrow(site, range(site.width // 2)) for site in sites))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_narrower_site_takes_its_batch_norms_statistics_along(dtype: torch.dtype) -> None:
    model, x = convolutions().to(dtype).eval(), torch.randn(1, 3, 8, 8).to(dtype)
    check(model, narrowed(find_sites(model, x)), x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_collapse_takes_batch_norm_and_activation(dtype: torch.dtype) -> None:
    model, x = convolutions().to(dtype).eval(), torch.randn(1, 3, 8, 8).to(dtype)
    check(model, Plan((Entry.collapse(find_sites(model, x)[0], becomes="merged"),)), x)


def test_a_norm_in_another_type_counts_in_its_own() -> None:
    model = convolutions().bfloat16().eval()
    model[1].float()
    sites = find_sites(convolutions().eval(), torch.randn(1, 3, 8, 8))
    plan = narrowed(sites)
    before = cost_of(convolutions().eval(), torch.randn(1, 3, 8, 8))
    # 8 channels: 27 + 4 weights and a PReLU's in 2 bytes, four numbers of the norm in 4
    assert before.size - cost_after(plan, before, model).size == 8 * ((27 + 4 + 1) * 2 + 4 * 4)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 4), nn.PReLU(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(x + self.a(x)))


def test_an_activation_place_saves_the_activations_weights() -> None:
    model, x = Places().eval(), torch.randn(2, 8)
    plan = Plan.collapse(find_sites(model, x, kinds=("hidden", "activation")))
    assert plan.params_saved == 8
    check(model, plan, x)


class Attention(nn.Module):
    """Grouped queries, packed or not, with an explicit product or the fused one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.fused = 4, 2, fused
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, n, self.groups, -1).transpose(1, 2).repeat_interleave(self.heads // self.groups, 1)
        v = self.v(x).view(b, n, self.groups, -1).transpose(1, 2).repeat_interleave(self.heads // self.groups, 1)
        if self.fused:
            z = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            z = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.o(z.transpose(1, 2).reshape(b, n, -1))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.o = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(z.transpose(1, 2).reshape(b, n, -1))


def test_heads_save_their_products_with_the_sequence() -> None:
    model, x = MultiHead().eval(), torch.randn(3, 5, 16)
    sites = find_sites(model, x, kinds=("hidden", "heads")).select(lambda site: site.kind == "heads")
    assert len(sites) == 1
    plan = Plan((Entry.narrow(sites[0], [0, 2]),))
    # q k and p v of two heads: 3 rows, 5 x 5 positions, 4 channels
    assert plan.macs_saved == 2 * (3 * 5 * 16 * (4 * 3) + 3 * 5 * 4 * 16) + 2 * (2 * 3 * 5 * 5 * 4)
    check(model, plan, x)


def test_a_llamas_kv_cache_shrinks_with_its_heads() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 32, (2, 7))}
    sites = find_sites(model, inputs, kinds=("hidden", "heads")).select(lambda site: site.kind == "heads")
    before = cost_of(model, inputs)
    assert before.kv == 2 * 2 * 2 * 8 * 4  # layers, heads, key and value, head_dim, bytes
    plan = Plan(tuple(Entry.narrow(site, [1]) for site in sites))
    assert cost_after(plan, before, model).kv == before.kv // 2
    check(model, plan, inputs)
