"""A plan as edits: what they are, and that nothing changes before they are performed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.kinds import find_sites
from shallower.modules.edits import Doubled, Externalise, Identity, Resize, Slope, Weights, edits, perform, replay
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from shallower.surgery.operating import edits_of, operate
from shallower.surgery.simulation import simulate
from tests.networks import Chain, params

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def kinds(plan: Plan, model: nn.Module) -> list[type]:
    return [type(edit) for edit in edits_of(plan, model)]


def chain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).double(), torch.randn(4, 3, dtype=torch.float64)


def test_a_plan_is_a_list_of_edits_that_leaves_the_model_alone() -> None:
    model, x = chain()
    before = copy.deepcopy(model.state_dict())
    plan = Plan.collapse(find_sites(model, x))
    made = edits_of(plan, model)
    assert [type(edit) for edit in made] == [Resize, Weights, Identity, Identity] * 2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert edits(model) == []


def test_performing_them_is_surgery() -> None:
    model, x = chain()
    plan = Plan.collapse(find_sites(model, x))
    small, operated = copy.deepcopy(model), copy.deepcopy(model)
    for edit in edits_of(plan, model):
        perform(small, edit)
    for step in steps(plan.entries):
        operate(operated, step)
    assert torch.equal(small(x), operated(x))
    assert torch.equal(small(x), apply(model, plan, x)(x))


def test_a_site_whose_channels_all_stay_takes_no_edit() -> None:
    model, x = chain()
    assert kinds(Plan((Entry.narrow(find_sites(model, x)[0], torch.arange(8)),)), model) == []


class Packed(nn.Module):
    def __init__(self, producer: nn.Module, consumer: nn.Module, f: nn.Module | None = None) -> None:
        super().__init__()
        self.both, self.down, self.f = producer, consumer, f

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.both(x).chunk(2, 1)
        y: Tensor = self.down(F.silu(u) * v if self.f is None else self.f(u) * v)
        return y


def test_a_packed_gate_becomes_its_input_twice() -> None:
    model, x = Packed(nn.Conv2d(2, 16, 1), nn.Conv2d(8, 3, 1)).double(), torch.randn(2, 2, 4, 4).double()
    made = kinds(Plan.collapse(find_sites(model, x)), model)
    assert Doubled in made
    assert Externalise in made


def test_a_packed_gate_in_front_of_padding_keeps_its_bias_in_the_half_of_the_up_projection() -> None:
    model, x = Packed(nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 3, padding=1)).double(), torch.randn(2, 3, 6, 6).double()
    plan = Plan.collapse(find_sites(model, x))
    assert torch.allclose(apply(model, plan, x)(x), simulate(model, plan)(x))


def test_consumers_are_fitted_behind_a_depthwise_producer_with_all_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x = torch.randn(2, 4, 6, 6)
    fit = Fit((torch.randn(5, 4, 1, 1),), (torch.randn(5),))
    small = apply(model, Plan((Entry.narrow(find_sites(model, x)[0], torch.arange(4), fit=fit),)), x)
    assert torch.equal(small[2].weight, fit.consumers[0])


def test_a_prelu_slope_takes_the_place_of_the_activation_and_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.PReLU(8), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    site = find_sites(model, x)[0]
    entry = Entry(site, torch.zeros(8, dtype=torch.int8), torch.ones(8), torch.zeros(8), torch.full((8,), 0.5), "prelu")
    plan = Plan((entry,))
    assert Slope in kinds(plan, model)
    small = apply(model, plan, x)
    assert {name for name, _ in small.named_parameters() if name.startswith("1.")} == {"1.slope"}
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert before - after == plan.params_saved


def test_a_forward_that_reads_settings_of_a_layer_that_is_gone_goes_on() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            extra = self.a.stride[0] - 1
            y: Tensor = self.b(self.act(self.a(F.pad(x, (0, extra, 0, extra)))))
            return y

    model, x = Reading(), torch.randn(2, 3, 7, 7)
    small = apply(model, Plan.collapse(find_sites(model, x)), x)
    assert isinstance(small.a, nn.Identity)


def test_the_site_behind_a_collapsed_one_in_front_of_an_average_collapses_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 20, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    small = apply(model, Plan.collapse(find_sites(model, x)), x)
    assert [tuple(p.shape) for p in small.parameters()] == [(5, 3), (5,)]


def test_an_activation_with_weights_that_is_called_at_several_places_stays_one() -> None:
    torch.manual_seed(0)
    model, x = Chain([3, 8, 6, 2], nn.PReLU(), [True] * 3).eval(), torch.randn(4, 3)
    first, second = find_sites(model, x)
    fates = torch.tensor([0] * 4 + [1] * 4, dtype=torch.int8)
    sloped = Entry(second, torch.zeros(6, dtype=torch.int8), torch.ones(6), torch.zeros(6), torch.tensor([0.3]))
    plan = Plan((Entry(first, fates, torch.ones(8), torch.zeros(8)), sloped))
    small = apply(model, plan, x)
    assert small.f_call_0.f.weight is small.f_call_1.f.weight is small.f.weight
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert before - after == plan.params_saved


class Twice(nn.Module):
    """One PReLU that is called behind two layers, and has a second name."""

    def __init__(self, slopes: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.act = self.alias = nn.PReLU(slopes)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block with an activation that is given."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 12), nn.Linear(12, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))  # type: ignore[no-any-return]


def sharing(kind: str, slopes: int) -> nn.Module:
    torch.manual_seed(0)
    act = nn.PReLU(slopes)
    block = Block(act)
    made = {
        "calls": Twice(slopes),
        "blocks": nn.Sequential(block, Block(act)),
        "one block twice": nn.Sequential(block, block),
        "items": nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 12), act, nn.Linear(12, 4)),
    }
    return made[kind].double()


SHARING = ["calls", "blocks", "one block twice", "items"]


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("kept", [0, 5])
def test_an_activation_that_nothing_calls_any_more_goes(kind: str, kept: int) -> None:
    """Merged, or narrowed with slopes for each channel: both leave the shared one behind."""
    model, x = sharing(kind, slopes=12), torch.randn(3, 8, dtype=torch.float64)
    sites = find_sites(model, x)
    plan = Plan(tuple(Entry.narrow(site, torch.arange(kept)) for site in sites))
    small = apply(model, plan, x)
    assert params(small) == params(model) - plan.params_saved
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    fresh = replay(sharing(kind, slopes=12), edits(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("kind", ["calls", "blocks", "items"])
def test_an_activation_that_is_still_called_stays(kind: str) -> None:
    model, x = sharing(kind, slopes=1), torch.randn(3, 8, dtype=torch.float64)
    plan = Plan.collapse(find_sites(model, x)[:1])
    small = apply(model, plan, x)
    assert params(small) == params(model) - plan.params_saved
    assert any(isinstance(module, nn.PReLU) for module in small.modules())
    assert torch.allclose(small(x), simulate(model, plan)(x))
