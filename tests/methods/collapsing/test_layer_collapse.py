"""LayerCollapse: its penalties by hand, its stages, its plans against the network that was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.files import read_state, write_state
from shallower.core.inputs import call
from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.collapsing.stages import StageResult, Stages
from shallower.modules.attachment import detached_copy
from shallower.planning.entries import Fate
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training import Recipe
from tests.networks import AfterSum
from tests.zoo import FunctionalMLP, GeGLU, SwiGLU, channels_last, norms_around_activations

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
LABELS = (X[:, 0] + X[:, 1] > 0).long()
BATCHES = [(X[i : i + 16], LABELS[i : i + 16]) for i in range(0, 64, 16)]


def network(seed: int = 0, wide: int = 32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, wide), nn.GELU(), nn.Linear(wide, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    )


def method_on(model: nn.Module, inputs: Any = X, **options: Any) -> LayerCollapse:
    return LayerCollapse(model, find_sites(model, inputs), **options)


def set_slopes(method: LayerCollapse, *slopes: float | Tensor) -> None:
    with torch.no_grad():
        for module, slope in zip(method.activations.values(), slopes, strict=True):
            module.slope.copy_(torch.as_tensor(slope))


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == LABELS).float().mean())


# ---------------------------------------------------------------------- attaching


def test_attaching_changes_nothing_that_the_model_computes() -> None:
    model = network().eval()
    before = model(X)
    method_on(model)
    torch.testing.assert_close(model(X), before)


def test_slopes_are_never_without_a_dimension() -> None:
    model = network()
    assert [tuple(a.shape) for a in method_on(model).slopes().values()] == [(1,), (1,)]
    model = network()
    assert [tuple(a.shape) for a in method_on(model, granularity="channel").slopes().values()] == [(32,), (8,)]


def test_prelu_family_starts_at_the_papers_slope() -> None:
    method = method_on(network(), family="prelu")
    assert all(float(a) == pytest.approx(0.01) for a in method.slopes().values())


def test_slopes_are_float32_in_a_half_precision_model_and_float64_in_a_double_one() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = network().to(dtype)
        method = method_on(model, X.to(dtype))
        assert {a.dtype for a in method.slopes().values()} == {expected}
        assert model(X.to(dtype)).dtype == dtype


def test_second_method_on_the_same_model_is_refused_and_the_first_stays() -> None:
    model = network()
    sites = find_sites(model, X)
    first = LayerCollapse(model, sites)
    with pytest.raises(MethodError, match="attached here already; detach"):
        LayerCollapse(model, sites)
    assert all(module in list(model.modules()) for module in first.activations.values())


def test_sites_that_cannot_be_linear_are_left_alone_and_told() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    x = torch.randn(2, 3, 4, 4)
    sites = find_sites(model, x)
    method = LayerCollapse(model, sites, include="*")
    (skipped,) = [site for site in sites if site.not_linear]
    assert method.sites.skipped[skipped.name] == skipped.not_linear
    assert [site.name for site in method.sites] == [site.name for site in sites if not site.not_linear]


def two_parts() -> tuple[nn.Sequential, Tensor]:
    """A 3x3 convolution after another, which merge into something dearer, and a wide head, which pays."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    return model.eval(), torch.randn(2, 3, 8, 8)


def test_sites_that_save_nothing_are_left_out_and_told() -> None:
    model, x = two_parts()
    method = LayerCollapse(model, find_sites(model, x))
    assert [site.name for site in method.sites] == ["4"]
    assert list(method.left_out) == ["0", "2"]
    assert "no layer becomes cheaper" in method.left_out["0"]
    assert method.sites.skipped["0"] == method.left_out["0"]


@pytest.mark.parametrize("include", ["0", "*", ["0"]])
def test_sites_that_save_nothing_are_taken_where_they_are_named(include: Any) -> None:
    model, x = two_parts()
    method = LayerCollapse(model, find_sites(model, x), include=include)
    assert [site.name for site in method.sites] == ["0", "4"]
    assert list(method.left_out) == ["2"]  # no activation is behind it


def test_a_name_to_include_that_no_site_has_is_an_error() -> None:
    model, x = two_parts()
    with pytest.raises(MethodError, match="no site of that name"):
        LayerCollapse(model, find_sites(model, x), include="features*")


def test_a_network_in_which_no_site_pays_is_an_error_that_names_the_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(MethodError, match=r"no site pays .*include='\*'"):
        LayerCollapse(model, find_sites(model, torch.randn(1, 3, 8, 8)))


def test_no_usable_site_is_an_error() -> None:
    with pytest.raises(MethodError, match="no site that may become linear"):
        LayerCollapse(network(), Sites(()))


def test_gated_sites_have_no_prelu_family() -> None:
    with pytest.raises(MethodError, match="no PReLU form"):
        method_on(SwiGLU(), torch.randn(2, 3, 16), family="prelu")


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"slope_lr": 0.0}, {"arrive_in": 0}, {"family": "relu"}, {"granularity": "layer"}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        method_on(network(), **options)


def test_detach_restores_modules_and_leaves_trained_weights_bit_for_bit() -> None:
    model = network()
    modules = dict(model.named_modules())
    method = method_on(model)
    optimizer = torch.optim.AdamW(method.param_groups(0.01), lr=1e-2)
    for batch in BATCHES:
        method.loss(lambda batch=batch: task_loss(model, batch)).backward()
        optimizer.step()
    trained = {name: t.clone() for name, t in model.state_dict().items() if "slope" not in name}
    method.detach()
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == trained.keys()
    assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items())


def test_detach_gives_a_functional_forward_back() -> None:
    model, x = FunctionalMLP().eval(), torch.randn(5, 16)
    before = model(x)
    method = method_on(model, x)
    set_slopes(method, 1.0, 1.0)
    assert not torch.equal(model(x), before)
    method.detach()
    assert "forward" not in vars(model)
    assert torch.equal(model(x), before)


def test_checkpoint_resumes_in_a_fresh_model_with_the_method_attached() -> None:
    model, fresh = network(), network(seed=1)
    method, other = method_on(model), method_on(fresh)
    set_slopes(method, 0.3, 0.8)
    fresh.load_state_dict(model.state_dict())
    assert {n: float(a) for n, a in other.slopes().items()} == {n: float(a) for n, a in method.slopes().items()}
    assert torch.equal(fresh.eval()(X), model.eval()(X))


# ---------------------------------------------------------------------- penalties


def test_penalty_is_strength_times_the_sum_of_squared_distances() -> None:
    method = method_on(network(), strength=0.25)
    set_slopes(method, 0.5, -1.0)
    assert float(method.penalty().detach()) == pytest.approx(0.25 * (0.5**2 + 2.0**2))


def test_penalty_per_channel_is_the_mean_over_channels() -> None:
    method = method_on(network(), strength=0.25, granularity="channel")
    set_slopes(method, 0.5, torch.tensor([0.0, 1.0] * 4))
    assert float(method.penalty().detach()) == pytest.approx(0.25 * (0.5**2 + 0.5))


@pytest.mark.parametrize("granularity", ["site", "channel"])
def test_added_gradient_is_that_of_the_penalty(granularity: str) -> None:
    one, two = (method_on(network(), granularity=granularity) for _ in range(2))
    set_slopes(one, 0.5, 0.2)
    set_slopes(two, 0.5, 0.2)
    (task_loss(one.model, BATCHES[0]) + one.penalty()).backward()
    task_loss(two.model, BATCHES[0]).backward()
    two.add_penalty_grad()
    for a, b in zip(one.activations.values(), two.activations.values(), strict=True):
        torch.testing.assert_close(a.slope.grad, b.slope.grad)


def test_added_gradient_needs_no_backward_before() -> None:
    method = method_on(network(), strength=0.5)
    set_slopes(method, 0.5, 0.2)
    method.add_penalty_grad()
    grads = [float(m.slope.grad) for m in method.activations.values() if m.slope.grad is not None]
    assert grads == pytest.approx([-0.5, -0.8])


def test_loss_is_the_tasks_plus_the_penalty() -> None:
    method = method_on(network())
    loss = method.loss(lambda: torch.tensor(3.0))
    assert float(loss.detach()) == pytest.approx(3 + 0.5 * 2)


def test_decoupled_step_follows_its_formula_and_leaves_the_loss_alone() -> None:
    method = method_on(network(), strength=0.5, decoupled=True)
    set_slopes(method, 0.5, 0.2)
    assert float(method.penalty().detach()) == 0
    method.add_penalty_grad()
    assert all(module.slope.grad is None for module in method.activations.values())
    method.after_step(lr=0.1)
    expected = [a - 2 * 0.1 * 0.5 * (a - 1) for a in (0.5, 0.2)]
    assert [float(a) for a in method.slopes().values()] == pytest.approx(expected)


def test_slopes_get_no_weight_decay_and_their_own_learning_rate() -> None:
    method = method_on(network(), slope_lr=0.3)
    decayed, plain, slopes = method.param_groups(weight_decay=0.01)
    assert [p.dim() for p in decayed["params"]] == [2, 2, 2]
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == slopes["weight_decay"] == 0
    assert slopes["params"] == [module.slope for module in method.activations.values()]
    assert slopes["lr"] == 0.3
    assert "lr" not in decayed


def test_every_parameter_is_in_one_group() -> None:
    method = method_on(network())
    listed = [id(p) for group in method.param_groups() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in method.model.parameters())


def test_arrive_in_brings_slopes_to_exactly_one_against_any_gradient() -> None:
    method = method_on(network(), strength=0.0, arrive_in=10)
    seen = []
    for _ in range(10):
        method.before_step()
        with torch.no_grad():
            for module in method.activations.values():
                module.slope.sub_(0.5)
        method.after_step(lr=0.1)
        seen.append([float(a) for a in method.slopes().values()])
    assert seen[4] == pytest.approx([0.5, 0.5])
    assert seen[-1] == pytest.approx([1.0, 1.0])


def test_slope_that_is_exactly_one_stays() -> None:
    method = method_on(network(), granularity="channel")
    set_slopes(method, 1.0, torch.tensor([1.0, 0.5] * 4))
    method.before_step()
    with torch.no_grad():
        for module in method.activations.values():
            module.slope.add_(0.1)
    method.after_step(lr=0.1)
    first, second = method.slopes().values()
    assert torch.equal(first, torch.ones(32))
    torch.testing.assert_close(second, torch.tensor([1.0, 0.6] * 4))


def test_settle_sets_near_slopes_to_one_and_freezes_whole_sites() -> None:
    method = method_on(network(), granularity="channel")
    set_slopes(method, 0.96, torch.tensor([0.97, 0.5] * 4))
    first, second = method.activations
    assert method.settle(0.05) == (first,)
    assert torch.equal(method.slopes()[second], torch.tensor([1.0, 0.5] * 4))
    assert not method.activations[first].slope.requires_grad
    assert method.activations[second].slope.requires_grad


def test_normal_training_reaches_the_tolerance() -> None:
    model = network()
    method = method_on(model, strength=1.0, slope_lr=2e-2)
    optimizer = torch.optim.AdamW(method.param_groups(0.01), lr=1e-3)
    for _ in range(60):
        for batch in BATCHES:
            optimizer.zero_grad()
            method.loss(lambda batch=batch: task_loss(model, batch)).backward()
            optimizer.step()
    assert all(abs(1 - float(a)) < 0.05 for a in method.slopes().values())


# ---------------------------------------------------------------------- plans


def double(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


LIVE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "modules": (network, (64, 8)),
    "functions": (FunctionalMLP, (5, 16)),
    "norms": (norms_around_activations, (4, 3, 16)),
    "gated": (SwiGLU, (2, 3, 16)),
    "packed gate": (GeGLU, (2, 3, 16)),
    "convolutions": (channels_last, (2, 3, 16, 16)),
}


def live(name: str, granularity: str) -> tuple[nn.Module, LayerCollapse, Tensor]:
    make, shape = LIVE[name]
    model, x = double(make), torch.randn(shape, dtype=torch.float64)
    return model, LayerCollapse(model, find_sites(model, x), granularity=granularity), x  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
@pytest.mark.parametrize("granularity", ["site", "channel"])
@pytest.mark.parametrize("name", LIVE)
def test_with_slopes_one_surgery_equals_the_live_model(name: str, granularity: str) -> None:
    model, method, x = live(name, granularity)
    set_slopes(method, *[1.0] * len(method.sites))
    small = apply(model, method.plan(), x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
@pytest.mark.parametrize("name", LIVE)
def test_with_mixed_channels_surgery_equals_the_live_model(name: str) -> None:
    model, method, x = live(name, "channel")
    for module in method.activations.values():
        slopes = torch.rand(module.slope.numel(), dtype=torch.float64) * 0.9
        slopes[::2] = 1.0
        module.slope.data.copy_(slopes)
    small = apply(model, method.plan(affine="unit"), x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
@pytest.mark.parametrize("family", ["blend", "prelu"])
def test_site_that_did_not_arrive_keeps_its_slope(family: str) -> None:
    model = network().double().eval()
    method = method_on(model, X.double(), family=family)
    set_slopes(method, 0.5, 1.0)
    plan = method.plan()
    assert [set(entry.fates.tolist()) for entry in plan.entries] == [{Fate.KEEP}, {Fate.LINEAR}]
    small = apply(model, plan, X.double())
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-9, atol=1e-11)


def test_untouched_site_is_not_in_the_plan() -> None:
    model = network()
    method = method_on(model)
    set_slopes(method, 0.0, 1.0)
    assert [entry.site.name for entry in method.plan().entries] == [method.sites[1].name]


def test_tolerance_decides_what_is_linear() -> None:
    method = method_on(network())
    set_slopes(method, 0.96, 0.94)
    assert [int(entry.fates[0]) for entry in method.plan(0.05).entries] == [Fate.LINEAR, Fate.KEEP]
    assert [int(entry.fates[0]) for entry in method.plan(0.1).entries] == [Fate.LINEAR, Fate.LINEAR]


def test_unit_fold_has_slope_one_even_where_data_know_better() -> None:
    method = method_on(network())
    set_slopes(method, 0.96, 0.96)
    for entry in method.plan(affine="unit", batches=BATCHES).entries:
        assert torch.equal(entry.slopes, torch.ones_like(entry.slopes))
        assert torch.equal(entry.offsets, torch.zeros_like(entry.offsets))


def test_calibrated_fold_is_nearer_to_the_live_model_than_slope_one() -> None:
    model = network().eval()
    method = method_on(model)
    set_slopes(method, 0.96, 0.96)
    unit, best = (apply(model, method.plan(affine=a, batches=BATCHES), X)(X) for a in ("unit", "best"))
    assert (best - model(X)).norm() < 0.5 * (unit - model(X)).norm()


def test_gaussian_fold_takes_the_batch_norm_at_its_word() -> None:
    model = network().eval()
    method = method_on(model)
    norm = model[3]
    torch.nn.init.uniform_(norm.weight, -1, 1)
    torch.nn.init.uniform_(norm.bias, -1, 1)
    set_slopes(method, 1.0, 0.96)
    first, second = method.plan(affine="gaussian").entries
    assert torch.equal(first.slopes, torch.ones_like(first.slopes))
    below = torch.distributions.Normal(0.0, 1.0).cdf(-norm.bias / norm.weight.abs()).double().detach()
    torch.testing.assert_close(second.slopes, 1 - 0.04 * below, rtol=1e-4, atol=1e-6)


def test_gated_fold_is_the_best_multiple_of_u() -> None:
    model, x = SwiGLU().eval(), torch.randn(20, 3, 16)
    method = method_on(model, x)
    set_slopes(method, 0.96)
    (entry,) = method.plan(batches=[x]).entries
    with torch.no_grad():
        gate, uu = model.w1(x).reshape(-1, 37), model.w3(x).reshape(-1, 37).square()
    live_gate = 0.96 + 0.04 * F.silu(gate)
    torch.testing.assert_close(entry.slopes, ((live_gate * uu).sum(0) / uu.sum(0)).double(), rtol=1e-4, atol=1e-5)


def test_plan_holds_for_the_weights_it_was_made_for() -> None:
    model = network()
    method = method_on(model)
    set_slopes(method, 1.0, 1.0)
    assert method.plan().fingerprint
    before = copy.deepcopy(model.state_dict())
    method.plan(batches=BATCHES)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tolerance": 0.0}, "positive"), ({"affine": "calibration"}, "needs batches"), ({"affine": "line"}, "choose")],
)
def test_plan_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        method_on(network()).plan(**options)


def test_activation_place_is_linear_or_as_it_was() -> None:
    model = AfterSum().eval()
    sites = find_sites(model, X, kinds=("hidden", "activation"))
    method = LayerCollapse(model, sites, granularity="channel", include="*")
    assert not method.plan().entries
    set_slopes(method, 0.5)
    with pytest.raises(MethodError, match="train it further"):
        method.plan()
    set_slopes(method, 1.0)
    torch.testing.assert_close(apply(model, method.plan(), X)(X), model(X))


# ---------------------------------------------------------------------- order and stages


@torch.no_grad()
def test_sensitivity_is_what_a_site_alone_costs() -> None:
    model = network().eval()
    method = method_on(model)
    base = model(X).detach()
    expected = []
    for alone in ((1.0, 0.0), (0.0, 1.0)):
        set_slopes(method, *alone)
        expected.append(float((model(X) - base).square().sum() / base.square().sum()))
    set_slopes(method, 0.0, 0.0)
    assert list(method.sensitivity([X]).values()) == pytest.approx(expected, rel=1e-4)
    assert [float(a) for a in method.slopes().values()] == [0.0, 0.0]


@torch.no_grad()
def test_sensitivity_of_the_loss_and_of_a_score() -> None:
    model = network().eval()
    method = method_on(model)
    set_slopes(method, 1.0, 0.0)
    whole = (X, LABELS)
    gained, lost = float(task_loss(model, whole)), accuracy(model)
    set_slopes(method, 0.0, 0.0)
    first = method.sites[0].name
    assert method.sensitivity([whole], loss=task_loss)[first] == pytest.approx(
        gained - float(task_loss(model, whole)), abs=1e-5
    )
    assert method.sensitivity([], score=accuracy)[first] == pytest.approx(accuracy(model) - lost)


RECIPE = Recipe(epochs=4, lr=5e-3)


def fitted(model: nn.Module, method: LayerCollapse | None = None, **options: Any) -> list[StageResult]:
    method = method_on(model) if method is None else method
    chosen = {name: options.pop(name) for name in ("order", "arrive", "tolerance") if name in options}
    stages = Stages(options.pop("stages", None), **chosen)
    return method.fit(BATCHES, task_loss, RECIPE, stages, cpu=True, **options)


def test_stages_collapse_one_site_after_another() -> None:
    model = network()
    stages = fitted(model)
    assert [len(stage.collapsed) for stage in stages] == [1, 2]
    assert stages[1].slopes[stages[0].sites[0]] == 1


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
def test_fitted_model_is_exactly_the_collapsed_one() -> None:
    model = network()
    method = method_on(model)
    fitted(model, method)
    model.eval()
    small = apply(model, method.plan(), X)
    assert not any(isinstance(module, nn.GELU | nn.ReLU) for module in small.modules())
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)


def test_later_sites_rest_until_their_stage() -> None:
    model = network()
    method = method_on(model)
    first, second = method.sites[0].name, method.sites[1].name
    stages = fitted(model, method, order="last-first")
    assert [stage.sites for stage in stages] == [(second,), (first,)]
    assert stages[0].slopes[first] == 0


def test_several_sites_at_once_are_one_stage() -> None:
    (stage,) = fitted(network(), stages=1)
    assert len(stage.collapsed) == 2


def test_stages_can_be_named() -> None:
    model = network()
    method = method_on(model)
    stages = fitted(model, method, stages=[[method.sites[1].name]])
    assert [stage.collapsed for stage in stages] == [(method.sites[1].name,)]


def test_sites_are_divided_evenly_among_the_stages() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    stages = fitted(model, stages=2, order="last-first")
    assert [len(stage.sites) for stage in stages] == [2, 3]


def test_without_arrive_only_the_penalty_decides() -> None:
    stages = fitted(network(), LayerCollapse(model := network(), find_sites(model, X), strength=0.0), arrive=None)
    assert stages[-1].collapsed == ()


def test_stage_below_the_floor_is_taken_back() -> None:
    model = network()
    method = method_on(model)
    scores = iter([0.9, 0.1])
    after_first: dict[str, Tensor] = {}

    def score(model: nn.Module) -> float:
        after_first.update({} if after_first else {k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    stages = fitted(model, method, score=score, floor=0.5)
    assert [stage.taken_back for stage in stages] == [False, True]
    assert stages[1].collapsed == stages[0].collapsed == stages[0].sites
    assert all(torch.equal(t, after_first[name]) for name, t in model.state_dict().items())
    assert [entry.site.name for entry in method.plan().entries] == list(stages[0].sites)


def test_interrupted_stages_go_on_where_they_were(tmp_path: Path) -> None:
    whole = network()
    expected = fitted(whole)
    steps = 0

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal steps
        steps += 1
        # the first batches measure the sensitivity; this is in the second stage's second epoch
        if model.training and steps > 34:
            raise KeyboardInterrupt
        return task_loss(model, batch)

    model = network()
    with pytest.raises(KeyboardInterrupt):
        method_on(model).fit(BATCHES, interrupted, RECIPE, checkpoint=tmp_path, cpu=True)
    resumed = network(seed=9)
    stages = fitted(resumed, checkpoint=tmp_path)
    assert [stage.sites for stage in stages] == [stage.sites for stage in expected]
    assert stages[1].history.resumed > 0
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())


def test_order_survives_an_interruption_of_the_first_stage(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            raise KeyboardInterrupt
        return task_loss(model, batch)

    model = network()
    method = method_on(model)
    names = [site.name for site in method.sites]
    with pytest.raises(KeyboardInterrupt):
        method.fit(BATCHES, interrupted, RECIPE, Stages(order=names), checkpoint=tmp_path, cpu=True)
    assert method.arrive_in is None
    assert method.active == tuple(names)
    stages = fitted(network(), order=names[::-1], checkpoint=tmp_path)
    assert [stage.sites for stage in stages] == [(name,) for name in names]


def test_finished_stages_are_not_trained_again(tmp_path: Path) -> None:
    model = network()
    fitted(model, checkpoint=tmp_path)

    def never(_model: nn.Module, _batch: Any) -> Tensor:
        raise AssertionError("trained again")

    again = network(seed=9)
    stages = method_on(again).fit(BATCHES, never, RECIPE, checkpoint=tmp_path, cpu=True)
    assert len(stages) == 2
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fitted(network(), checkpoint=tmp_path)
    with pytest.raises(MethodError, match="another run"):
        method_on(network()).fit(BATCHES, task_loss, Recipe(epochs=1, lr=1e-3), checkpoint=tmp_path, cpu=True)
    with pytest.raises(MethodError, match=r"another run \(strength, tolerance differ"):
        fitted(network(), method_on(network(), strength=2.0), tolerance=0.1, checkpoint=tmp_path)


def test_stages_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    model = network()
    expected = fitted(model, checkpoint=tmp_path)
    path = tmp_path / "stages.safetensors"
    state = read_state(path, error=MethodError)
    earlier = {
        "schema": 1,
        "groups": state["chosen"]["groups"],
        "stages": state["rounds"],
        "recipe": state["identity"]["recipe"],
        "model": state["model"],
    }
    write_state(path, earlier, error=MethodError)
    again = network(seed=9)
    assert fitted(again, checkpoint=tmp_path) == expected
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"stages": 3}, {"stages": 0}, {"stages": [["x"]]}, {"order": ["0"]}, {"order": "x"}, {"floor": 0.5}]
)
def test_stages_that_do_not_fit_the_sites_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        fitted(network(), **options)


def test_plan_of_an_attached_model_applies_to_its_detached_copy_too() -> None:
    model = network().eval()
    method = method_on(model)
    set_slopes(method, 1.0, 1.0)
    plan: Plan = method.plan()
    torch.testing.assert_close(call(apply(detached_copy(model), plan, X), X), call(apply(model, plan, X), X))


# ---------------------------------------------------------------------- wrong use


@pytest.mark.parametrize("name", ["strength", "slope_lr", "arrive_in"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_numbers_that_are_no_sensible_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(MethodError, match=name):
        method_on(network(), **{name: value})


@pytest.mark.parametrize("tolerance", [float("nan"), 5.0, -0.1])
def test_a_tolerance_out_of_range_is_refused(tolerance: float) -> None:
    method = method_on(network())
    with pytest.raises(MethodError, match="tolerance"):
        method.plan(tolerance)
    with pytest.raises(MethodError, match="tolerance"):
        method.settle(tolerance)


def test_a_plan_after_detaching_is_refused() -> None:
    method = method_on(network())
    method.detach()
    with pytest.raises(MethodError, match="before detach"):
        method.plan()


def test_a_decoupled_step_needs_a_rate() -> None:
    method = method_on(network(), decoupled=True)
    with pytest.raises(MethodError, match="follow"):
        method.after_step()
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.5)
    method.follow(optimizer)
    task_loss(method.model, BATCHES[0]).backward()
    optimizer.step()
    set_slopes(method, 0.0, 0.0)
    method.after_step()
    assert [float(a) for a in method.slopes().values()] == pytest.approx([0.5, 0.5])


def test_a_fit_leaves_the_order_of_the_loader_to_what_follows(tmp_path: Path) -> None:
    def order() -> list[Tensor]:
        data = torch.utils.data.TensorDataset(X, LABELS)
        generator = torch.Generator().manual_seed(4)
        loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=generator)
        model = network()
        method_on(model).fit(loader, task_loss, Recipe(epochs=1, lr=1e-3), 1, checkpoint=tmp_path, cpu=True)
        return [x for x, _ in loader]

    assert all(torch.equal(a, b) for a, b in zip(order(), order(), strict=True))
