"""The sums that outputs go into, followed while a model runs."""

from __future__ import annotations

import torch
from torch import nn

from shallower.calibrating.residual_sums import ResidualSums


def test_the_residual_sum_is_found_through_scale_norm_and_transposition() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).eval()
    norm.running_var.uniform_(0.5, 2)
    scale = nn.Parameter(torch.rand(3) + 0.5)
    y, r = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    with ResidualSums() as sums:
        sums.follow(y)
        out = r + norm(y.transpose(1, 2)) * scale
    change = torch.randn_like(r)
    back = torch.randn_like(y)
    with ResidualSums() as other:
        other.follow(back)
        _ = (r + change) + norm(back.transpose(1, 2)) * scale
    difference = other.others[0] - sums.others[0]
    moved = r + norm((y + difference).transpose(1, 2)) * scale
    torch.testing.assert_close(moved, out + change)


def test_an_output_that_is_normalised_first_has_no_residual_sum() -> None:
    y = torch.randn(2, 4)
    with ResidualSums() as sums:
        sums.follow(y)
        _ = torch.randn(2, 4) + nn.functional.layer_norm(y, (4,))
    assert sums.others == [None]


def test_an_addition_in_place_is_seen_as_it_was() -> None:
    y, r = torch.randn(2, 4), torch.randn(2, 4)
    before = r.clone()
    with ResidualSums() as sums:
        sums.follow(y)
        r += y
    (other,) = sums.others
    assert other is not None
    assert torch.equal(other, before)


def test_a_unit_of_the_output_is_measured_through_the_scales() -> None:
    y = torch.randn(2, 4)
    scale = nn.Parameter(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    with ResidualSums(measure=True) as sums:
        sums.follow(y)
        _ = torch.randn(2, 4) + y * scale
    (unit,) = sums.units
    assert unit is not None
    torch.testing.assert_close(unit[0], 1 / scale.detach())


def test_an_output_that_nothing_is_added_to_has_no_residual_sum() -> None:
    y = torch.randn(2, 4)
    with ResidualSums() as sums:
        sums.follow(y)
        _ = y.relu() + 1
    assert sums.others == [None]
