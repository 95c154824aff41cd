"""What sites become: one layer, two with nothing between them, or fewer channels."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import load, save
from shallower.surgery.applying import apply
from shallower.surgery.padding import move_padding
from tests.finding.linear.networks import linear
from tests.networks import Inverted, _randomised
from tests.planning.forms.samples import X, block, checked, mixed

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


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
    sites = linear(block(kernel_size=2, padding="same"), X)
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
    sites = find_sites(model, X, kinds=("hidden", "activation")).select(lambda site: not site.followed)
    assert sorted(site.kind for site in sites) == ["activation"] * 2 + ["convolution"] * 2
    small = checked(model, Plan.collapse(sites))
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", model=resnet())(X), small(X))


def test_a_block_whose_activations_are_gone_is_one_convolution(tmp_path):
    model = resnet()
    moved = move_padding(model, find_sites(model, X))
    sites = find_sites(moved, X, kinds=("hidden", "activation"))
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
