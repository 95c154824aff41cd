"""Experts are found behind routers of every form, and cut exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.planning.forms import steps
from shallower.planning.forms.form import totals
from tests.experts import How, Mixture
from tests.followed import drawn

PLACES = {"up", "up_bias", "down", "router.weight", "router.bias"}

MIXTURES = {
    "top-2": lambda: Mixture(),
    "top-1": lambda: Mixture(1),
    "top-2 of sigmoids": lambda: Mixture(scores="sigmoid", normed=True, corrected=True),
    "normalised weights": lambda: Mixture(3, normed=True),
    "a shared expert": lambda: Mixture(shared=True),
    "scattered weights": lambda: Mixture(how="scattered", scores="sigmoid", corrected=True),
    "stretches": lambda: Mixture(how="stretches", normed=True),
    "stretches of one": lambda: Mixture(1, "stretches", shared=True),
    "all of them": lambda: Mixture(how="soft"),
}


def half_of(sites: sh.Sites) -> sh.Plan:
    """Every second channel of some sites."""
    return sh.Plan(tuple(sh.Entry.narrow(site, range(1, site.width, 2)) for site in sites))


@pytest.mark.parametrize("name", MIXTURES)
def test_half_of_the_experts_are_cut_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make = MIXTURES[name]
    model, x = drawn(make()), torch.randn(2, 6, 5)
    (site,) = sites = find_sites(model, x, kinds="experts")
    assert (site.kind, site.width) == ("experts", 8)
    assert {slot.tensor for slot in site.slots} >= PLACES
    plan = half_of(sites)
    small = sh.apply(model, plan, x)
    assert small.up.shape == (4, 8, 16)
    assert small.router.out_features == 4
    other = torch.randn(3, 9, 5)
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))
    sh.save(small, tmp_path / "small")
    again = sh.load(tmp_path / "small", model=make())
    assert torch.equal(again.eval()(other), small(other))


@pytest.mark.parametrize("how", ["picked", "stretches"])
def test_fewer_experts_do_as_much_work(how: How) -> None:
    model, x = drawn(Mixture(how=how)), torch.randn(2, 40, 5)
    sites = find_sites(model, x, kinds="all")
    assert {site.name: site.kind for site in sites if site.width} == {
        "down:stream": "stream", "up": "hidden", "router": "experts"
    }  # fmt: skip
    for kinds in (["experts"], ["hidden"], ["stream", "hidden", "experts"]):
        chosen = sites.select(lambda site, kinds=kinds: site.kind in kinds)
        plan = sh.Plan(tuple(sh.Entry.narrow(site, range(0, site.width, 2)) for site in chosen))
        small = sh.apply(model, plan, x)
        (_, before), (_, after) = totals(step.form for step in steps(plan.entries))
        assert sh.measure(model, x).macs - sh.measure(small, x).macs == before - after


def test_what_is_left_is_chosen_anew() -> None:
    model, x = drawn(Mixture(1)), torch.randn(40, 5)
    sites = find_sites(model, x, kinds="experts")
    plan = half_of(sites)
    simulated = sh.simulate(model, plan)
    scores = model.router(model.into(x))
    assert set(scores.argmax(-1).tolist()) & {0, 2, 4, 6}
    # as if a router of four rows had chosen
    kept = torch.tensor([1, 3, 5, 7])
    by_hand = drawn(Mixture(1, experts=4))
    with torch.no_grad():
        for part, whole in zip(by_hand.parameters(), model.parameters(), strict=True):
            part.copy_(whole if part.shape == whole.shape else whole[kept])
    torch.testing.assert_close(simulated(x), by_hand(x))


def test_groups_are_cut_whole_or_all_alike() -> None:
    model, x = drawn(Mixture(scores="sigmoid", groups=4, experts=16)), torch.randn(30, 5)
    groups, each = sites = find_sites(model, x, kinds="experts")
    assert (groups.width, each.width) == (4, 4)
    # one group of the four is chosen, and two experts of it
    assert (groups.least, each.least) == (1, 2)
    plan = half_of(sites)
    small, other = sh.apply(model, plan, x), torch.randn(7, 5)
    assert small.up.shape[0] == 4
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))


def test_as_many_stay_as_are_chosen() -> None:
    model, x = drawn(Mixture(3)), torch.randn(6, 5)
    (site,) = find_sites(model, x, kinds="experts")
    assert site.least == 3
    with pytest.raises(sh.PlanError, match="keep at least as many"):
        sh.Entry.narrow(site, [0, 1])
    assert sh.apply(model, sh.Plan((sh.Entry.narrow(site, [0, 4, 7]),)), x).up.shape[0] == 3


def test_experts_that_are_all_chosen_stay() -> None:
    sites = find_sites(drawn(Mixture(8)), torch.randn(6, 5), kinds="experts")
    assert len(sites) == 0
    assert "chosen every time" in sites.skipped["router"]


class Numbered(nn.Module):
    """Computes with the numbers of the experts, or returns them."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.returned, self.router, self.up = returned, nn.Linear(5, 4), nn.Parameter(torch.empty(4, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.router(x).argmax(-1)
        y = x * self.up[chosen]
        if self.returned:
            return y, chosen
        return y, y * (chosen + 1)[:, None]


@pytest.mark.parametrize(("returned", "reason"), [(True, "the model returns it"), (False, "computes with the numbers")])
def test_numbers_that_mean_something_keep_all_experts(returned: bool, reason: str) -> None:
    sites = find_sites(drawn(Numbered(returned)), torch.randn(6, 5), kinds="experts")
    assert len(sites) == 0
    assert reason in sites.skipped["router"]


class Smallest(nn.Module):
    """Chooses the smallest scores."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(5, 4), nn.Parameter(torch.empty(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up[self.router(x).topk(1, -1, largest=False)[1][:, 0]]


class Total(nn.Module):
    """Divides sigmoids by their sum, to which a dropped expert would add a half if it were not left out."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(5, 4), nn.Parameter(torch.empty(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        best, chosen = (scores / scores.sum(-1, keepdim=True)).max(-1)
        return x * self.up[chosen] * best[:, None]


def test_choices_that_a_mask_would_change_keep_all_experts() -> None:
    sites = find_sites(drawn(Smallest()), torch.randn(6, 5), kinds="experts")
    assert len(sites) == 0
    assert "compares its channels" in sites.skipped["router"]


def test_shares_of_a_sum_are_those_of_the_experts_that_stay() -> None:
    model, x = drawn(Total()), torch.randn(9, 5)
    (site,) = find_sites(model, x, kinds="experts")
    plan = sh.Plan((sh.Entry.narrow(site, [0, 2, 3]),))
    torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))


def test_shares_of_features_are_no_experts() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).softmax(-1) @ (F.elu(self.k(x)).mT @ self.v(x))

    assert len(find_sites(drawn(Linear()), torch.randn(2, 5, 6), kinds="experts")) == 0


FAMILIES = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "intermediate_size": 24}, "num_local_experts"),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "num_experts",
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4,
        },
        "n_routed_experts",
    ),
    "gpt_oss": (transformers.GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}, "num_local_experts"),
    "jamba": (
        transformers.JambaConfig,
        {"num_experts": 4, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
        "num_experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name: str, tmp_path: Path) -> None:
    made, sizes, _ = FAMILIES[name]
    config = made(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, **{"intermediate_size": 24, "head_dim": 8, **sizes},
    )  # fmt: skip
    torch.manual_seed(0)
    model, x = transformers.AutoModelForCausalLM.from_config(config).eval(), {"input_ids": torch.arange(14).view(2, 7)}
    sites = find_sites(model, x, kinds="experts")
    assert {site.width for site in sites} == {4}
    plan = half_of(sites)
    small = sh.apply(model, plan, x)
    other = {"input_ids": torch.arange(33).view(3, 11)}
    expected, found = sh.simulate(model, plan)(**other).logits, small(**other).logits
    torch.testing.assert_close(found, expected)
    sh.save(small, tmp_path / "small")
    assert torch.equal(sh.load(tmp_path / "small").eval()(**other).logits, found)
