"""Variants are built, fitted and judged on rows that they were not fitted to."""

from __future__ import annotations

import torch
from torch import nn

from shallower.core.inputs import default_inputs_of
from shallower.core.modes import evaluating
from shallower.finding.kinds import find_sites
from shallower.methods.tlc.trying import Trial, variance_error
from shallower.planning.entries import Entry


def trial(model: nn.Module, x: torch.Tensor, batches: list[torch.Tensor] | None) -> Trial:
    return Trial(model, x, batches, None, (0.5,), 2, default_inputs_of)


def test_a_pair_of_convolutions_may_become_one_fitted_kernel_or_a_narrower_pair() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.randn(4, 4, 8, 8)
    (site,) = find_sites(model, x)
    with evaluating(model):
        tried = trial(model, x, [torch.randn(8, 4, 8, 8) for _ in range(3)]).of([Entry.collapse(site)])
    assert tried is not None
    labels = [variant.label for variant in tried.variants]
    assert labels[0] == "apart, all channels"
    assert {"one fitted 3x3 kernel", "one fitted 1x1 kernel", "narrowed to 4"} <= set(labels)
    assert set(tried.errors) == {variant.label for variant in tried.variants if variant.fitted}
    assert all(0 <= error < 1.1 for error in tried.errors.values())
    assert tried.errors["one fitted 3x3 kernel"] < tried.errors["one fitted 1x1 kernel"]


def test_without_batches_nothing_is_fitted() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(8, 4)
    (site,) = find_sites(model, x)
    with evaluating(model):
        tried = trial(model, x, None).of([Entry.collapse(site)])
    assert tried is not None
    assert [variant.label for variant in tried.variants] == ["apart, all channels", "merged"]
    assert set(tried.seconds) == {"now", "apart, all channels", "merged"}
    assert set(tried.against("now")) == {"apart, all channels", "merged"}


def test_the_error_is_a_part_of_the_variance() -> None:
    reference = torch.randn(50, 3, dtype=torch.float64)
    mean = reference.mean(0, keepdim=True).expand_as(reference)
    assert variance_error(reference, reference) == 0
    assert abs(variance_error(mean, reference) - 1) < 1e-12
