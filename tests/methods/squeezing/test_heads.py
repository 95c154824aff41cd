"""Attention heads and other followed sites, squeezed with hidden channels in one budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from tests.finding.test_heads import llama


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 40, (4, 12))} for _ in range(count)]


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches()])


def test_a_target_of_the_kv_cache_takes_groups_of_heads() -> None:
    model, inputs = llama(8, 4)
    sites = find_sites(model, inputs, kinds=("hidden", "heads"))
    plan = squeeze(model, sites, batches(), "kv:50%")
    assert {entry.site.kind for entry in plan.entries} == {"heads"}
    assert [entry.site.block for entry in plan.entries] == [8] * len(plan.entries)
    small = apply(model, plan, inputs)
    before, after = cost_of(model, inputs).kv, cost_of(small, inputs).kv
    assert before is not None
    assert after == before // 2


def test_fitted_heads_answer_more_like_the_model_than_the_same_heads_cut() -> None:
    model, inputs = llama(8, 4)
    sites = find_sites(model, inputs, kinds="heads")
    plan = squeeze(model, sites, batches(), "kv:50%")
    cut = Plan(tuple(Entry.narrow(entry.site, entry.kept) for entry in plan.entries))
    dense = outputs(model)
    fitted, plain = (float((outputs(apply(model, p, inputs)) - dense).square().mean()) for p in (plan, cut))
    assert fitted < plain


def test_heads_and_channels_share_one_budget() -> None:
    model, inputs = llama(8, 8)
    sites = find_sites(model, inputs, kinds=("hidden", "heads"))
    plan = squeeze(model, sites, batches(), "macs:70%", options=sh.SqueezeOptions(round_to=4))
    assert {entry.site.kind for entry in plan.entries} == {"heads", "gated"}
    widths = {entry.site.kind: len(entry.kept) % 4 for entry in plan.entries if entry.site.kind == "gated"}
    assert widths == {"gated": 0}  # heads are few: the multiple is one of channels


def test_the_kv_cache_is_refused_without_heads() -> None:
    model, inputs = llama(8, 4)
    with pytest.raises(sh.TargetError, match=r"only attention heads do. Find the sites with\s*kinds"):
        squeeze(model, find_sites(model, inputs), batches(), "kv:50%")


class Normed(nn.Module):
    """A norm behind the activation, so that its channels can be kept and dropped and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 6)
        self.last = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(x + self.down(self.norm(self.up(x).relu())))
        return y


def test_channels_that_may_not_become_linear_are_squeezed() -> None:
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(8, 6)
    sites = find_sites(model, x)
    assert [site.followed for site in sites] == [True, False]
    plan = squeeze(model, sites, [torch.randn(32, 6) for _ in range(4)], "params:60%")
    assert plan.entries[0].site.followed
    assert plan.entries[0].fit is not None
    small = apply(model, plan, x)
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())


def test_of_sites_that_share_a_layer_one_is_squeezed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    sites = find_sites(model, torch.randn(2, 4))
    assert len(sites) == 2
    chosen = narrowable(sites)
    assert len(chosen) == 1
    assert "shares a layer with" in chosen.skipped[sites[1].name]
