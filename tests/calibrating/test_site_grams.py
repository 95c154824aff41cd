"""What is kept of a site, and its sums."""

from __future__ import annotations

import torch
from torch import nn

from shallower.calibrating.site_grams import SiteGrams, SiteRows, may_collapse, read_alike
from shallower.finding.kinds import find_sites


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, x, y = (torch.randn(count, d, generator=generator, dtype=torch.float64) for d in (5, 3, 2))
    return z, x, y


def test_one_row_in_eight_is_held_out() -> None:
    z, x, y = rows(40)
    grams = SiteGrams.of(z, x, y)
    assert (grams.fit.count, grams.held.count) == (35, 5)
    assert grams.all.count == 40
    torch.testing.assert_close(grams.held.centred().mean_z, z[35:].mean(0))


def test_of_small_batches_one_row_in_eight_is_held_out() -> None:
    total = SiteGrams.of(*rows(2), number=0)
    for number in range(1, 16):
        total += SiteGrams.of(*rows(2, number), number=number)
    assert (total.fit.count, total.held.count) == (28, 4)


def test_moments_of_both_sides_are_kept_only_where_asked_for() -> None:
    z, x, y = rows(40)
    assert SiteGrams.of(z, None, y).shapes == {"fit": (5, 2)}
    assert SiteGrams.of(z, x, y).shapes == {"fit": (5, 2), "inputs": (3, 2)}
    joint = SiteGrams.of(z, x, y, joint=True)
    assert joint.shapes == {"fit": (5, 2), "inputs": (3, 2), "joint": (8, 2)}
    assert joint.joint is not None
    torch.testing.assert_close(joint.joint[0].part(slice(0, 5)).centred().zz, joint.fit.centred().zz)


def test_sums_of_batches_add_up_and_nothing_changes_nothing() -> None:
    one, other = (SiteGrams.of(*rows(40, seed), joint=True) for seed in (0, 1))
    total = one + other
    assert total.inputs is not None
    assert total.fit.count == 70
    assert total.inputs[1].count == 10
    same = total + SiteGrams.empty(total.shapes, torch.device("cpu"))
    torch.testing.assert_close(same.fit.centred().zz, total.fit.centred().zz)
    assert same.over_processes().fit.count == 70


def test_rows_come_in_chunks_that_fit() -> None:
    images = SiteRows(torch.randn(10, 3, 64, 64), torch.randn(10, 2, 64, 64))
    chunks = list(images.chunks(256))
    assert len(chunks) > 1
    assert torch.equal(torch.cat([chunk.x for chunk in chunks]), images.x)
    assert images.positions == 10 * 64 * 64


def test_which_sites_may_become_one_map() -> None:
    linear = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    (site,) = find_sites(linear, torch.randn(2, 4))
    assert may_collapse(site)
    assert read_alike(site)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    (site,) = find_sites(convolutions, torch.randn(2, 3, 5, 5))
    assert not may_collapse(site)
    assert not read_alike(site)
