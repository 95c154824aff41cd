"""Sites become linear a few at a time; what is trained is what the plan says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import MethodError, TargetError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.methods.tlc.choosing import choose_forms
from shallower.methods.tlc.pace import Pace
from shallower.methods.tlc.till_layers_collapse import TillLayersCollapse
from shallower.modules.attachment import detached_copy
from shallower.planning.entries import Fate
from shallower.planning.targets import Target
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from shallower.training import Checkpoint, Recipe
from tests.finding.linear.networks import linear

RECIPE = Recipe(epochs=1, lr=0.01, optimizer="sgd")


class Block(nn.Module):
    """Two convolutions around an activation, with a sum and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    """Stem, two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
    return model.eval()


def labelled(seed: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in images]


def task_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def attached(model: nn.Module, **options: Any) -> TillLayersCollapse:
    sites = find_sites(model, torch.zeros(2, 3, 8, 8), kinds=("hidden", "activation"))
    return TillLayersCollapse(model, sites, batches=[x for x, _ in labelled(9)], **options)


def mlp(f: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), f, nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def test_attaching_changes_nothing() -> None:
    model, x = network(), labelled(1)[0][0]
    before = model(x)
    attached(model)
    assert torch.equal(model(x), before)


def test_detaching_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = attached(model)
    method.linearise(list(method.activations))
    method.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("line", ["auto", "unit", "best"])
def test_the_plan_simulated_is_the_model_that_is_trained(line: Any) -> None:
    model, x = network(), labelled(1)[0][0]
    method = attached(model, line=line)
    method.linearise(list(method.activations))
    found = model(x)
    torch.testing.assert_close(simulate(model, method.plan())(x), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("f", [nn.GELU(), nn.ReLU(inplace=True), nn.Tanh()])
def test_sites_without_batchnorm_go_by_measured_statistics(f: nn.Module) -> None:
    model = mlp(f)
    x = torch.randn(64, 6)
    method = TillLayersCollapse(model, find_sites(model, x, kinds=("hidden", "activation")), line="best", batches=[x])
    method.linearise(list(method.activations))
    found = model(x)
    torch.testing.assert_close(simulate(model, method.plan())(x), found, rtol=1e-5, atol=1e-5)


def test_a_gate_becomes_a_constant() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(32, 6)
    method = TillLayersCollapse(model, find_sites(model, x), batches=[x])
    method.linearise(list(method.activations))
    found = model(x)
    torch.testing.assert_close(simulate(model, method.plan())(x), found, rtol=1e-5, atol=1e-5)


def test_channels_whose_mean_is_not_positive_are_dropped() -> None:
    model = network()
    method = attached(model)
    method.linearise(["blocks.0"])
    (entry,) = method.plan().entries
    expected = torch.where(model.blocks[0].bn1.bias > 0, int(Fate.LINEAR), int(Fate.DROP))  # type: ignore[arg-type]
    assert entry.fates.tolist() == expected.tolist()


def test_the_state_of_a_model_says_which_sites_are_linear() -> None:
    model = network()
    method = attached(model)
    method.linearise(["blocks.0", "blocks.1:relu#1"])
    other = network(1)
    resumed = attached(other)
    other.load_state_dict(model.state_dict())
    assert resumed.linear == method.linear
    x = labelled(1)[0][0]
    assert torch.equal(other(x), model(x))


def test_a_plan_of_a_count_leaves_the_model_as_it_was() -> None:
    model, x = network(), labelled(1)[0][0]
    before = model(x)
    method = attached(model)
    plan = method.plan(count=2)
    assert {entry.site.name for entry in plan.entries} == set(list(method.rank())[:2])
    assert torch.equal(model(x), before)


def test_batchnorm_alone_ranks_without_data() -> None:
    model = network()
    sites = find_sites(model, torch.zeros(2, 3, 8, 8))
    costs = TillLayersCollapse(model, sites).rank()
    assert set(costs) == {"blocks.0", "blocks.1"}
    assert list(costs.values()) == sorted(costs.values())


def test_the_loss_criterion_orders_by_the_gap_of_each_site_alone() -> None:
    model, batches = network(), labelled(2)
    method = attached(model, criterion="loss")
    costs = method.rank(batches, task_loss)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(task_loss(model, b)) for b in batches) / len(batches)

    base, name = loss(), next(iter(costs))
    method.linearise([name])
    assert costs[name] == pytest.approx(loss() - base)


def test_a_drop_target_takes_what_the_score_allows() -> None:
    model = network()
    method = attached(model)

    def score(m: nn.Module) -> float:  # noqa: ARG001
        return 1.0 - 0.1 * len(method.linear)

    assert len(method.plan(target="drop:0.35", score=score)) == 3


@pytest.mark.parametrize("target", ["params:97%", "size:97%", "macs:95%", "params:90%"])
def test_a_target_of_cost_takes_the_fewest_that_meet_it(target: str) -> None:
    model, x = network(), torch.zeros(2, 3, 8, 8)
    method = attached(model)
    plan = method.plan(target=target, example_inputs=x)
    method.detach()
    before, wanted = cost_of(model, x), Target.parse(target)
    assert wanted.met(before, cost_of(apply(model, plan, x), x))
    fewer = attached(model).plan(count=len(plan) - 1)
    assert not wanted.met(before, cost_of(apply(model, fewer, x), x))


def test_a_target_out_of_reach_is_an_error() -> None:
    model, x = network(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(TargetError, match="all 5 sites together"):
        attached(model).plan(target="params:1%", example_inputs=x)


def test_rounds_take_one_site_after_another_until_none_is_left() -> None:
    model = network()
    method = attached(model)
    done = method.fit(labelled(3), task_loss, RECIPE)
    assert [len(r.removed) for r in done] == [1, 2, 3, 4, 5]
    assert method.linear == tuple(method.activations)
    assert all(len(r.history.losses) == 1 for r in done)


def test_sites_that_do_not_raise_the_validation_loss_go_together() -> None:
    model = network()
    nn.init.zeros_(model.head.weight)  # no site matters
    (done,) = attached(model).fit(labelled(3), task_loss, RECIPE, Pace(rounds=1), validation=labelled(4))
    assert len(done.linearised) == 5
    assert done.joint == pytest.approx(done.base)


def test_where_every_site_costs_something_the_cheapest_goes_alone() -> None:
    model = network()
    batches = labelled(4)
    with torch.no_grad():  # labels that this very network gives: any change is for the worse
        own = [(x, model(x).argmax(1)) for x, _ in batches]
        model.head.weight.mul_(30)
    method = attached(model, criterion="loss")
    (done,) = method.fit(own, task_loss, RECIPE, Pace(rounds=1), validation=own)
    assert done.joint is not None
    assert done.base is not None
    assert done.linearised == (next(iter(done.costs)),) or done.joint <= done.base


def test_a_round_under_the_floor_is_taken_back_and_is_the_last() -> None:
    model = network()
    method = attached(model)
    scores = iter([0.9, 0.4])
    states = []
    done = method.fit(
        labelled(3),
        task_loss,
        RECIPE,
        score=lambda _: next(scores),
        floor=0.5,
        on_round=lambda _: states.append(copy.deepcopy(model.state_dict())),
    )
    assert [r.taken_back for r in done] == [False, True]
    assert method.linear == done[0].removed == done[1].removed
    assert all(torch.equal(t, states[0][name]) for name, t in model.state_dict().items())


def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> dict[str, Tensor]:
        model = network()
        method = attached(model)
        calls = 0

        def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal calls
            calls += m.training
            if calls == stop_at:
                raise KeyboardInterrupt
            return task_loss(m, batch)

        method.fit(
            labelled(3), loss, RECIPE, Pace(1, 3), validation=labelled(4), score=lambda _: 1.0, floor=0.0,
            checkpoint=Checkpoint(folder, every=1),
        )  # fmt: skip
        return dict(model.state_dict())

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 6)  # within the second round
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 3)  # and again
    resumed = run(tmp_path / "parts", None)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    method = attached(network())
    done = method.fit(labelled(3), task_loss, RECIPE, Pace(rounds=2), checkpoint=tmp_path)

    def fails(_model: nn.Module, _batch: Any) -> Tensor:
        raise AssertionError

    again = attached(network())
    assert again.fit(labelled(3), fails, RECIPE, Pace(rounds=2), checkpoint=tmp_path) == done
    assert again.linear == method.linear


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    attached(network()).fit(labelled(3), task_loss, RECIPE, Pace(rounds=1), checkpoint=tmp_path)
    with pytest.raises(MethodError, match=r"another run \(criterion differ"):
        attached(network(), criterion="random").fit(labelled(3), task_loss, RECIPE, Pace(rounds=1), checkpoint=tmp_path)


@pytest.mark.parametrize("criterion", ["entropy", "random"])
def test_other_criteria_share_the_loop(criterion: Any) -> None:
    method = attached(network(), criterion=criterion)
    first = next(iter(method.rank()))
    (done,) = method.fit(labelled(3), task_loss, RECIPE, Pace(rounds=1))
    assert done.linearised == (first,)


def test_a_random_order_is_that_of_its_seed() -> None:
    orders = [list(attached(network(), criterion="random", seed=seed).rank()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_errors_say_what_is_missing() -> None:
    model = network()
    sites = find_sites(model, torch.zeros(2, 3, 8, 8), kinds=("hidden", "activation"))
    with pytest.raises(MethodError, match=r"criterion='entropy' needs batches="):
        TillLayersCollapse(model, sites, criterion="entropy")
    with pytest.raises(MethodError, match="no BatchNorm feeds"):
        TillLayersCollapse(model, sites)
    with pytest.raises(MethodError, match="the criteria are"):
        TillLayersCollapse(model, sites, criterion="best")  # type: ignore[arg-type]
    method = attached(model, criterion="loss")
    with pytest.raises(MethodError, match="validation"):
        method.rank()
    with pytest.raises(MethodError, match="validation"):
        method.fit(labelled(3), task_loss, RECIPE)
    with pytest.raises(MethodError, match="floor= needs score="):
        method.fit(labelled(3), task_loss, RECIPE, validation=labelled(4), floor=0.5)
    with pytest.raises(MethodError, match="there are 5 sites"):
        method.plan(count=6)
    with pytest.raises(MethodError, match="there is no site 'x'"):
        method.linearise(["x"])


def test_a_failed_construction_leaves_nothing_attached() -> None:
    model = network()
    sites = find_sites(model, torch.zeros(2, 3, 8, 8), kinds=("hidden", "activation"))
    with pytest.raises(MethodError):
        TillLayersCollapse(model, sites)
    attached(model)


def test_sites_that_cannot_become_linear_are_told() -> None:
    model = network()
    sites = find_sites(model, torch.zeros(2, 3, 8, 8))
    stubborn = dataclasses.replace(sites[0], not_linear="it is stubborn")
    method = TillLayersCollapse(model, sites.only((stubborn, sites[1])))
    assert method.sites.skipped[stubborn.name] == "it is stubborn"
    assert list(method.activations) == [sites[1].name]


def test_half_precision_stays_half_precision() -> None:
    model = network().to(torch.bfloat16)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    method = TillLayersCollapse(model, find_sites(model, x))
    method.linearise(list(method.activations))
    assert model(x).dtype == torch.bfloat16


def bad_block(**options: Any) -> nn.Module:
    """A pair of convolutions that somebody has built in another way."""

    def build(kind: str = "conv", running: bool = True, mode: str = "zeros", groups: int = 1) -> nn.Module:
        torch.manual_seed(0)
        first = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
        if kind == "transposed":
            second: nn.Module = nn.ConvTranspose2d(8, 4, 3, padding=1)
        else:
            second = nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode, groups=groups)
        norm = nn.BatchNorm2d(8, track_running_stats=running)
        return nn.Sequential(first, norm, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()

    return build(**options)


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")  # what is faster may count more
@pytest.mark.parametrize("options", [{"mode": "reflect"}, {"mode": "circular"}, {"groups": 2}, {"groups": 4}])
def test_unusual_convolutions_lose_their_activation_exactly(options: dict[str, Any]) -> None:
    model, x = bad_block(**options), torch.randn(4, 4, 8, 8)
    method = TillLayersCollapse(model, find_sites(model, x, kinds=("hidden", "activation")), batches=[x])
    method.linearise(list(method.activations))
    found = model(x)
    plan = choose_forms(detached_copy(model), method.plan(), x, rounds=1)
    torch.testing.assert_close(apply(model, plan, x)(x), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kind": "transposed"}, {"running": False}])
def test_what_cannot_merge_is_skipped_with_the_reason(options: dict[str, Any]) -> None:
    model, x = bad_block(**options), torch.randn(4, 4, 8, 8)
    sites = linear(model, x)
    assert "0" not in sites
    assert any(word in " ".join(sites.skipped.values()) for word in ("ConvTranspose2d", "running statistics"))


def test_a_norm_whose_scale_is_zero_decides_by_its_shift() -> None:
    model, x = bad_block(), torch.randn(4, 4, 8, 8)
    norm = model[1]  # type: ignore[index]
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(torch.tensor([1.0, -1.0] * 4))
    before = model(x)
    method = TillLayersCollapse(model, find_sites(model, x).select("0"))
    method.linearise(["0"])
    torch.testing.assert_close(model(x), before)


def test_by_default_a_gelu_becomes_the_nearest_line_and_a_norm_decides_by_its_sign() -> None:
    x = torch.randn(64, 6)
    model = mlp(nn.GELU())
    method = TillLayersCollapse(model, find_sites(model, x).select("0"), batches=[x])
    method.linearise(["0"])
    slopes = method.activations["0"].slope
    assert bool(((slopes > 0.2) & (slopes < 0.8)).all())
    with_norms = attached(network())
    with_norms.linearise(["blocks.0"])
    assert set(with_norms.activations["blocks.0"].slope.tolist()) <= {0.0, 1.0}
