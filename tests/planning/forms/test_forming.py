"""What sites become: one layer, two with nothing between them, or fewer channels."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shallower.errors import PlanError
from shallower.finding.matching import find_sites
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.forms import form_of, steps
from shallower.planning.geometry import fitted_map
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import load, save
from shallower.sites import LinearMap, Site
from shallower.surgery.applying import apply
from shallower.surgery.padding import move_padding
from shallower.surgery.simulation import simulate
from tests.networks import Block, Inverted, _randomised

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(n: int = 6, residual: bool = False, **second: object) -> nn.Module:
    torch.manual_seed(0)
    up, down = nn.Conv2d(4, n, 3, padding=1), nn.Conv2d(n, 4, **{"kernel_size": 3, "padding": 1, **second})
    return _randomised(Block(up, nn.ReLU(), down, nn.BatchNorm2d(n), nn.Identity(), residual), torch.float64)


def checked(model: nn.Module, plan: Plan) -> nn.Module:
    """The model after surgery, if it equals the simulation and costs what the plan says."""
    small = apply(model, plan, X)
    with torch.no_grad():
        expected = simulate(model, plan)(X)
        assert (small(X) - expected).norm() <= 1e-10 * expected.norm()
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert saved == plan.params_saved
    return small


def mixed(site: Site, **changes: object) -> Entry:
    """Half of the channels linear with slopes and offsets, half dropped with constants."""
    n = site.width
    fates = torch.full((n,), int(Fate.DROP))
    fates[::2] = Fate.LINEAR
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return Entry(site, fates, numbers[0], numbers[1], **changes)


def test_two_padded_convolutions_stay_apart_without_activation_and_norm():
    model = block()
    (site,) = find_sites(model, X)
    plan = Plan.collapse([site])
    small = checked(model, plan)
    assert [type(m).__name__ for m in (small.up, small.before, small.f, small.down)] == [
        *("Conv2d", "Identity", "Identity", "Conv2d")
    ]
    assert form_of(plan.entries[0]).kind == "apart"
    assert "border" in form_of(plan.entries[0]).why
    assert torch.equal(small.down.weight, model.down.weight)


def test_constants_of_dropped_channels_in_front_of_padding_are_exact():
    model = block()
    (site,) = find_sites(model, X)
    small = checked(model, Plan((mixed(site),)))
    assert small.up.out_channels == 4  # three linear channels and one that carries the constants


def test_dropped_channels_that_are_zero_leave_nothing_behind():
    model = block()
    (site,) = find_sites(model, X)
    entry = mixed(site)
    small = checked(model, Plan((Entry(site, entry.fates, entry.slopes, torch.zeros(6)),)))
    assert small.up.out_channels == 3


def test_two_dense_kernels_do_not_merge_where_that_is_dearer():
    model = block(n=4, padding=0)
    (site,) = find_sites(model, X)
    form = form_of(Entry.collapse(site))
    assert form.kind in ("pair", "apart")
    assert "one layer would have" in form.why
    merged = Entry.collapse(site, becomes="merged")
    assert form_of(merged).kind == "merged"
    assert form_of(merged).macs > form.macs
    assert checked(model, Plan((merged,))).down.kernel_size == (5, 5)


@pytest.mark.parametrize("becomes", ["merged", "apart", "pair"])
@pytest.mark.parametrize("entry", [mixed, Entry.collapse])
def test_every_form_without_padding_between_is_exact(becomes, entry):
    model = block(n=12, padding=0)
    (site,) = find_sites(model, X)
    assert checked(model, Plan((entry(site, becomes=becomes),)))


@pytest.mark.parametrize(("g1", "g2"), [(2, 1), (1, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("becomes", ["", "merged", "apart"])
def test_grouped_convolutions_merge_or_stay_apart_exactly(g1, g2, becomes):
    torch.manual_seed(0)
    up, down = nn.Conv2d(4, 8, 3, groups=g1), nn.Conv2d(8, 4, 1, groups=g2)
    norm = nn.BatchNorm2d(8)
    model = _randomised(Block(up, nn.ReLU(), down, norm, nn.Identity(), residual=False), torch.float64)
    (site,) = find_sites(model, X)
    small = checked(model, Plan((mixed(site, becomes=becomes),)))
    if becomes == "merged":
        assert small.down.groups == min(g1, g2)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_channels_whose_norm_is_a_constant_become_it(shared):
    model = block()
    with torch.no_grad():
        model.before.weight.mul_(shared)
    (site,) = find_sites(model, X)
    assert checked(model, Plan.collapse([site]))


def test_a_skip_folds_into_the_merged_kernel_and_survives_saving(tmp_path):
    torch.manual_seed(0)
    model = block(n=12, residual=True, kernel_size=1, padding=0)
    (site,) = find_sites(model, X)
    small = checked(model, Plan((Entry.collapse(site, fold_skip=True),)))
    assert torch.allclose(small.down(X), small(X))
    save(small, tmp_path / "small")
    fresh = block(n=12, residual=True, kernel_size=1, padding=0)
    assert torch.equal(load(tmp_path / "small", model=fresh)(X), small(X))


def test_a_skip_does_not_fold_into_layers_that_stay_apart():
    model = block(n=12, residual=True)
    (site,) = find_sites(model, X)
    with pytest.raises(PlanError, match=r"folds into one merged map only.*pads with zeros"):
        Plan((Entry.collapse(site, fold_skip=True),))


def test_a_narrow_type_is_proven_with_its_skip_inside():
    model = block(n=12, residual=True, kernel_size=1, padding=0).to(torch.bfloat16)
    (site,) = find_sites(model, X.bfloat16())
    small = apply(model, Plan((Entry.collapse(site, fold_skip=True),)), X.bfloat16())
    assert small.down.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_one_fitted_kernel_of_any_size_replaces_a_pair(kernel):
    model = block(residual=True)
    (site,) = find_sites(model, X)
    ups = (torch.randn(4, 4, kernel, kernel, dtype=torch.float64),)
    fit = Fit((), (torch.randn(4, dtype=torch.float64),), ups=ups)
    entry = Entry(site, torch.ones(6, dtype=torch.int8), torch.ones(6), torch.zeros(6), fit=fit, fold_skip=True)
    small = checked(model, Plan((entry,)))
    assert small.down.kernel_size == (kernel, kernel)
    assert small.down.padding == (kernel // 2, kernel // 2)


def test_a_fitted_kernel_that_cannot_keep_the_size_is_refused():
    first = LinearMap("a", "conv2d", 4, 6, True, 1, (3, 3), (1, 1), (1, 1))
    second = LinearMap("b", "conv2d", 6, 4, True, 1, (3, 3), (1, 1), (1, 1))
    assert fitted_map(first, second, (3, 3)).padding == (1, 1)
    with pytest.raises(PlanError, match="no padding lets a kernel of 2x2"):
        fitted_map(first, second, (2, 2))


def test_a_low_rank_pair_keeps_a_constant_in_front_of_the_padding():
    model = block()
    (site,) = find_sites(model, X)
    torch.manual_seed(1)
    fit = Fit(
        (), (torch.randn(4),), torch.randn(2, 4, 3, 3), (torch.randn(4, 2, 3, 3),), down_bias=torch.randn(2)
    )  # fmt: skip
    entry = Entry(site, torch.ones(6, dtype=torch.int8), torch.ones(6), torch.zeros(6), fit=fit)
    small = checked(model, Plan((entry,)))
    assert (small.up.out_channels, small.down.in_channels) == (2, 2)


def test_a_refitted_producer_has_its_norm_shifted():
    model = block()
    (site,) = find_sites(model, X)
    torch.manual_seed(1)
    fit = Fit(
        (torch.randn(4, 2, 3, 3),), (torch.randn(4),), producer=torch.randn(2, 4, 3, 3), producer_bias=torch.randn(2)
    )
    small = checked(model, Plan((Entry.narrow(site, torch.tensor([1, 4]), fit=fit),)))
    assert torch.equal(small.up.weight, fit.producer.double())
    assert torch.equal(small.before.bias, fit.producer_bias.double())


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_paddings_stay_apart_and_narrow_exactly(mode):
    torch.manual_seed(0)
    model = block(padding_mode=mode)
    (site,) = find_sites(model, X)
    assert checked(model, Plan.collapse([site])).down.padding_mode == mode
    assert checked(model, Plan((Entry.narrow(site, torch.tensor([0, 3])),)))
    with pytest.raises(PlanError, match=f"pads with {mode}"):
        apply(model, Plan((Entry.collapse(site, becomes="merged"),)), X)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_padding_that_is_longer_on_one_side_is_skipped_with_the_reason():
    sites = find_sites(block(kernel_size=2, padding="same"), X)
    assert len(sites) == 0
    assert sites.skipped["up"] == "down pads one side more than the other"


class Classifier(nn.Module):
    """The end of MobileNetV2: a 1x1 convolution, an average over all pixels, a linear layer."""

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.last, self.norm = nn.Conv2d(4, 32, k, bias=False), nn.BatchNorm2d(32)
        self.f, self.classifier = nn.ReLU6(), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.f(self.norm(self.last(x))).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_convolution_merges_with_the_linear_layer_behind_global_average_pooling(dtype):
    torch.manual_seed(0)
    model = _randomised(Classifier(), torch.float64)
    (site,) = find_sites(model, X)
    assert checked(model, Plan.collapse([site])).classifier.weight.shape == (5, 4)
    assert checked(model, Plan((mixed(site, becomes="pair"),)))
    assert checked(model, Plan((Entry.narrow(site, torch.arange(6), torch.ones(32)),))).classifier.in_features == 6
    small = apply(model.to(dtype), Plan.collapse([site]), X.to(dtype))
    assert small.classifier.weight.dtype == dtype


def test_a_larger_kernel_stays_apart_from_the_linear_layer_behind_the_pooling():
    torch.manual_seed(0)
    model = _randomised(Classifier(3), torch.float64)
    (site,) = find_sites(model, X)
    small = checked(model, Plan.collapse([site]))
    assert (small.last.out_channels, small.classifier.in_features) == (32, 32)


def test_kept_channels_take_no_form_but_their_own():
    (site,) = find_sites(block(), X)
    with pytest.raises(PlanError, match="only a site without kept channels"):
        Entry(site, torch.zeros(6, dtype=torch.int8), torch.ones(6), torch.zeros(6), becomes="apart")


def test_a_chain_that_pays_as_a_whole_is_not_warned_of():
    torch.manual_seed(0)
    whole = Inverted(4, 24, 3, 1, 0, nn.ReLU6(), residual=False)
    model = _randomised(whole, torch.float64)
    sites = find_sites(model, X).select(lambda site: not site.between)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = Plan.collapse(sites)
    assert [step.form.kind for step in steps(plan.entries)] == ["merged", "merged"]
    assert steps(plan.entries)[0].form.params > sites[0].params
    assert checked(model, plan)


class Basic(nn.Module):
    """The block of CIFAR ResNets, with functional activations and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return _randomised(nn.Sequential(nn.Conv2d(4, 4, 1), Basic(), Basic()), torch.float64)


def test_functional_activations_go_and_stay_away_after_loading(tmp_path):
    model = resnet()
    sites = find_sites(model, X, places=True)
    assert [site.kind for site in sites] == ["convolution", "activation"] * 2
    small = checked(model, Plan.collapse(sites))
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", model=resnet())(X), small(X))


def test_a_block_whose_activations_are_gone_is_one_convolution(tmp_path):
    model = resnet()
    moved = move_padding(model, find_sites(model, X))
    sites = find_sites(moved, X, places=True)
    inner = [Entry.collapse(s, becomes="merged", fold_skip=True) for s in sites if s.kind == "convolution"]
    places = [Entry.collapse(s) for s in sites if s.kind == "activation"]
    small = checked(moved, Plan((*inner, *places)))
    assert torch.allclose(small[1].conv2(X), small[1](X))
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", model=resnet())(X), small(X))


def test_norms_are_measured_again_on_request():
    model = block(residual=True)
    whole = nn.Sequential(model, nn.BatchNorm2d(4).double()).eval()
    (site,) = find_sites(whole, X)
    small = apply(whole, Plan((Entry.narrow(site, torch.arange(2)),)), X, recalibrate=[X])
    assert torch.allclose(small[1](small[0](X)).mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-3)
