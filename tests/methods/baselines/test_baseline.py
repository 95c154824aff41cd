"""The rivals from the model to the plan: every one on every kind of site, in the model's own surgery."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_params
from shallower.methods.baselines.baseline import baseline
from shallower.methods.baselines.rivals import RIVALS
from shallower.sites import Sites
from tests.finding.test_heads import llama


class Images(nn.Module):
    """Two residual blocks of padded convolutions with BatchNorm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Sequential(
                nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
            )
            self.blocks.append(block)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def perceptron() -> tuple[nn.Module, Sites, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 4)).eval()
    batches = [torch.randn(30, 6) for _ in range(3)]
    return model, find_sites(model, batches[0]), batches


def images() -> tuple[nn.Module, Sites, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = Images(), [torch.randn(8, 4, 6, 6) for _ in range(3)]
    for batch in batches:
        model(batch)
    model.eval()
    return model, find_sites(model, batches[0]), batches


def language() -> tuple[nn.Module, Sites, list[dict[str, Tensor]]]:
    model, inputs = llama(4, 4)
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 40, (4, 12))} for _ in range(4)]
    return model, find_sites(model, inputs, kinds=("hidden", "heads")), batches


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("case", [perceptron, images, language], ids=["linear", "images", "language"])
def test_every_way_meets_its_target(name: str, case: object) -> None:
    model, sites, batches = case()  # type: ignore[operator]
    plan = baseline(name, model, sites, batches, "params:80%")
    small = sh.apply(model, plan, batches[0])
    assert plan.method == name
    assert 0.5 * count_params(model) < count_params(small) <= 0.8 * count_params(model)
    kinds = {entry.site.kind for entry in plan.entries}
    assert ("heads" in kinds) == (case is language and name not in ("vbp", "nystrom", "folding"))


@pytest.mark.parametrize("name", ["flap", "vbp"])
@pytest.mark.parametrize("case", [perceptron, images], ids=["linear", "images"])
def test_the_mean_of_a_sites_output_stays_where_it_goes_into_the_bias(name: str, case: object) -> None:
    model, sites, batches = case()  # type: ignore[operator]
    plan = baseline(name, model, sites[:1], batches, "params:90%")
    (entry,) = plan.entries
    small = sh.apply(model, plan, batches[0])
    given: list[Tensor] = []
    for network in (model, small):
        consumer = network.get_submodule(entry.site.consumers[0].name)
        handle = consumer.register_forward_hook(lambda _module, _args, output: given.append(output.detach()))
        with torch.no_grad():
            network(torch.cat(batches))
        handle.remove()
    before, after = (y.movedim(1, -1).flatten(0, -2).mean(0) for y in given)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_later_site_is_seen_behind_the_earlier_ones_as_they_are_narrowed() -> None:
    model, sites, batches = perceptron()
    plan = baseline("osscar", model, sites, batches, "params:60%")
    first, second = plan.entries
    assert second.fit is not None
    with torch.no_grad():
        x = torch.cat(batches)
        there = sh.apply(model, sh.Plan((first,)), batches[0])
        z, weight = there[:4](x), model[4].weight  # type: ignore[index]
    kept = second.kept
    larger = (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)
    larger = larger + 1e-2 * larger.diagonal().mean() * torch.eye(len(larger))
    wanted = torch.linalg.solve(larger[kept][:, kept], larger[kept] @ weight.T).T
    torch.testing.assert_close(second.fit.consumers[0].float(), wanted, rtol=1e-3, atol=1e-4)


def test_padding_counts_for_nothing() -> None:
    model, sites, batches = language()
    hidden = sites.select(lambda site: site.kind != "heads")
    masked, longer = [], []
    for batch in batches:
        ids = batch["input_ids"]
        masked.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        padded = torch.cat([ids, torch.zeros_like(ids)], 1)
        longer.append({"input_ids": padded, "attention_mask": (padded > 0).long()})
    plans = [baseline("flap", model, hidden, read, "params:80%") for read in (masked, longer)]
    for one, other in zip(*(plan.entries for plan in plans), strict=True):
        assert torch.equal(one.kept, other.kept)


def test_a_plan_is_the_same_again_and_leaves_the_model_alone() -> None:
    model, sites, batches = images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name in RIVALS:
        one, other = (baseline(name, model, sites, batches, "params:80%", seed=3) for _ in range(2))
        assert one.to_json() == other.to_json()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_done_is_said() -> None:
    model, sites, batches = perceptron()
    with pytest.raises(sh.MethodError, match=r"no baseline 'nothing'; there are random, magnitude"):
        baseline("nothing", model, sites, batches, "params:80%")
    with pytest.raises(sh.FitError, match="`batches` is empty"):
        baseline("flap", model, sites, [], "params:80%")
    with pytest.raises(sh.FitError, match="not finite"):
        baseline("flap", model, sites, [torch.full((4, 6), torch.nan)], "params:80%")
    with pytest.raises(sh.TargetError, match="not for baselines"):
        baseline("flap", model, sites, batches, "latency:2x")
    with pytest.raises(sh.TargetError, match="met by the model as it is"):
        baseline("flap", model, sites, batches, "params:100M")
    with pytest.raises(sh.TargetError, match="would remain"):
        baseline("flap", model, sites, batches, "params:1%")
    language_model, followed, ids = language()
    heads = followed.select(lambda site: site.kind == "heads")
    with pytest.raises(sh.SiteError, match=r"vbp has a rule for none of the sites.*attention heads"):
        baseline("vbp", language_model, heads, ids, "params:90%")
    with pytest.raises(sh.MethodError, match="another model"):
        baseline("flap", nn.Sequential(nn.Linear(2, 2)), sites, batches, "params:80%")


def test_attached_methods_are_looked_through() -> None:
    model, sites, batches = perceptron()
    plain = baseline("flap", model, sites, batches, "params:80%")
    method = sh.LayerCollapse(model, sites)
    attached = baseline("flap", model, sites, batches, "params:80%")
    method.detach()
    for one, other in zip(plain.entries, attached.entries, strict=True):
        assert torch.equal(one.kept, other.kept)
