"""Where the constants of linear and dropped channels go."""

from __future__ import annotations

import pytest
import torch

from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from tests.planning.forms.samples import X, block, checked, mixed

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


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


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_channels_whose_norm_is_a_constant_become_it(shared):
    model = block()
    with torch.no_grad():
        model.before.weight.mul_(shared)
    (site,) = find_sites(model, X)
    assert checked(model, Plan.collapse([site]))


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
