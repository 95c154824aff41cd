"""Widths by one threshold are those of a search over all thresholds; equal shares are equal."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.methods.baselines.sharing import above_one_threshold, shared_widths
from shallower.methods.squeezing.costing import WidthCosts
from shallower.planning.targets import Target


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), most=st.integers(3, 23))
def test_one_threshold_keeps_the_largest_scores_that_fit(seed: int, most: int) -> None:
    sites = find_sites(network(), torch.ones(1, 6))
    generator = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.rand(site.width, generator=generator) for site in sites}
    found = above_one_threshold(sites, scores, lambda widths: sum(widths.values()) <= most)
    # by brute force: the lowest threshold that leaves few enough, of each site at least the best
    expected: dict[str, int] = {}
    for threshold in torch.cat(list(scores.values())).sort().values:
        expected = {name: max(1, int((values > threshold).sum())) for name, values in scores.items()}
        if sum(expected.values()) <= most:
            break
    assert found == expected


def test_without_scores_every_site_keeps_the_same_share() -> None:
    model = network()
    costs = WidthCosts(model, find_sites(model, torch.ones(1, 6)))
    found = shared_widths(costs, Target.parse("params:50%"), None)
    small, large = (found[site.name] / site.width for site in reversed(list(costs.sites)))
    assert abs(small - large) <= 1 / 8
    assert costs.after(found).params <= 0.5 * costs.before.params


def test_equal_scores_all_go_at_once() -> None:
    sites = find_sites(network(), torch.ones(1, 6))
    scores = {site.name: torch.ones(site.width) for site in sites}
    assert set(above_one_threshold(sites, scores, lambda widths: sum(widths.values()) <= 20).values()) == {1}
