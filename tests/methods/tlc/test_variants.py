"""The exact forms of a group of sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.methods.tlc.variants import Variant, all_channels, exact_variants, is_open, skips
from shallower.planning.entries import Entry, Fate
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def chain_of(count: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(6, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double().eval(), torch.randn(4, 6, dtype=torch.float64)


def entries_of(model: nn.Module, x: torch.Tensor, dropped: bool = False) -> list[Entry]:
    entries = []
    for site in find_sites(model, x):
        fates = torch.full((site.width,), int(Fate.LINEAR), dtype=torch.int8)
        fates[: 2 * dropped] = int(Fate.DROP)
        ones, zeros = torch.ones(site.width, dtype=torch.float64), torch.zeros(site.width, dtype=torch.float64)
        entries.append(Entry(site, fates, ones, zeros))
    return entries


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_variant_does_what_the_plan_says(count: int, dropped: bool) -> None:
    model, x = chain_of(count)
    group = entries_of(model, x, dropped)
    expected = simulate(model, Plan(tuple(group)))(x)
    variants = [all_channels(group), *exact_variants(group)]
    for variant in variants:
        small = apply(model, Plan(variant.entries), x)
        torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-10)
    assert len({variant.label for variant in variants}) == len(variants)


def test_long_chains_are_not_combined() -> None:
    model, x = chain_of(6)
    assert [variant.label for variant in exact_variants(entries_of(model, x))] == ["merged"]


def test_a_merge_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    (variant,) = exact_variants(entries_of(model, torch.randn(1, 4)))
    macs, params = variant.cost
    assert (macs, params) == (16 - 256, 20 - (160 + 132))


def test_what_keeps_channels_or_is_fitted_is_not_open() -> None:
    model, x = chain_of(1)
    (site,) = find_sites(model, x)
    assert is_open(entries_of(model, x))
    assert not is_open([Entry.narrow(site, torch.arange(2))])
    assert not is_open([Entry.collapse(site, becomes="apart")])


def test_a_site_without_a_skip_folds_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    (site,) = find_sites(model, torch.randn(1, 3, 5, 5))
    assert skips(site, site.consumers[0]) == (False,)
    assert isinstance(all_channels([Entry.collapse(site)]), Variant)
