"""Which paddings are worth moving, and what the layers are afterwards."""

from __future__ import annotations

import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.planning.moving import as_moved, worth_moving
from shallower.sites import Sites
from shallower.surgery.padding import move_padding


def inverted(hidden: int = 24) -> nn.Module:
    layers = [
        nn.Conv2d(4, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 4, 3, padding=1),
    ]  # fmt: skip
    return nn.Sequential(*layers).eval()


def sites_of(model: nn.Module) -> Sites:
    return find_sites(model, torch.randn(1, 4, 9, 9))


def test_the_description_is_that_of_the_model_with_its_padding_moved() -> None:
    model = inverted()
    sites = sites_of(model)
    described = as_moved(sites, list(sites))
    found = sites_of(move_padding(model, sites))
    for one, other in zip(described, found, strict=True):
        assert [(m.padding, m.positions, m.size) for m in one.maps] == [
            (m.padding, m.positions, m.size) for m in other.maps
        ]


def test_a_widening_block_is_worth_it_and_one_without_padding_is_not() -> None:
    assert [site.name for site in worth_moving(sites_of(inverted()))] == [site.name for site in sites_of(inverted())]
    plain = nn.Sequential(nn.Conv2d(4, 24, 1), nn.ReLU(), nn.Conv2d(24, 4, 3)).eval()
    assert worth_moving(sites_of(plain)) == ()
    linear = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    assert worth_moving(find_sites(linear, torch.randn(2, 4))) == ()


def test_what_would_cost_more_is_not_moved() -> None:
    pair = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    assert worth_moving(find_sites(pair, torch.randn(1, 8, 9, 9)), "macs") == ()
