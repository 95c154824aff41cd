"""Sites without kept channels: one map, or two with nothing between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import form_of
from shallower.planning.geometry import fitted_map
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import load, save
from shallower.sites import LinearMap
from shallower.surgery.applying import apply
from tests.finding.linear.networks import linear
from tests.networks import Block, _randomised
from tests.planning.forms.samples import X, block, checked, mixed

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


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
    (site,) = linear(model, X)
    small = checked(model, Plan((mixed(site, becomes=becomes),)))
    if becomes == "merged":
        assert small.down.groups == min(g1, g2)


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
