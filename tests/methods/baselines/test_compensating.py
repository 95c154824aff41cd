"""What the consumers become: unchanged, corrected by the mean, or refitted with or without an intercept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.calibrating.grams import Gram
from shallower.finding.kinds import find_sites
from shallower.methods.baselines.compensating import mean_in_bias, refitted, unchanged
from shallower.methods.baselines.view import View
from tests.methods.baselines.samples import view, waves


def biased() -> tuple[View, torch.Tensor]:
    """A site whose consumer has a bias, and what it reads, with a mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 5)).double().eval()
    (site,) = find_sites(model, torch.ones(1, 4, dtype=torch.float64))
    z = waves(40, 12, 1.0) + 2
    return View(model, site, Gram.of(z)), z


def test_nothing_is_fitted_where_nothing_is_compensated() -> None:
    assert unchanged(view(), torch.tensor([1, 2])) is None


@pytest.mark.parametrize("towards_weights", [False, True])
def test_a_refit_with_an_intercept_is_that_of_least_squares_with_a_column_of_ones(towards_weights: bool) -> None:
    seen, z = biased()
    kept = torch.tensor([0, 3, 7])
    fit = refitted(1e-12, towards_weights=towards_weights)(seen, kept)
    wanted = z @ seen.weight.T + seen.bias
    best = torch.linalg.lstsq(torch.cat([z[:, kept], torch.ones(40, 1)], 1), wanted).solution
    torch.testing.assert_close(fit.consumers[0], best[:-1].T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.biases[0], best[-1], rtol=1e-6, atol=1e-6)


def test_a_large_ridge_leads_back_to_the_weights_as_they_were() -> None:
    seen, _ = biased()
    kept = torch.tensor([0, 3, 7])
    towards = refitted(1e9, towards_weights=True)(seen, kept).consumers[0]
    torch.testing.assert_close(towards, seen.weight[:, kept], rtol=1e-6, atol=1e-6)
    assert refitted(1e9)(seen, kept).consumers[0].abs().max() < 1e-6


def test_the_mean_keeps_the_bias_that_was_there() -> None:
    seen, z = biased()
    fit = mean_in_bias(seen, torch.arange(11))
    torch.testing.assert_close(fit.biases[0], seen.bias + seen.weight[:, 11] * z[:, 11].mean())
