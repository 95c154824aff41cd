"""A site's numbers are the same whether products or squares alone were read, and columns stand by channels."""

from __future__ import annotations

import pytest
import torch

from shallower.errors import FitError
from shallower.finding.kinds import find_sites
from shallower.methods.baselines.view import View
from tests.methods.baselines.samples import channels, view
from tests.methods.baselines.test_baseline import images, language


@pytest.mark.parametrize("full", [False, True])
def test_means_and_variances_are_those_of_the_rows(full: bool) -> None:
    _, _, z = channels()
    seen = view(full)
    torch.testing.assert_close(seen.mean, z.mean(0))
    torch.testing.assert_close(seen.variance, z.var(0, unbiased=False))
    torch.testing.assert_close(seen.energy, z.square().mean(0))


def test_a_channel_of_a_convolution_has_a_column_for_each_tap() -> None:
    model, sites, _ = images()
    seen = View(model, sites[0])
    weight = model.blocks[0][3].weight  # type: ignore[index]
    assert seen.columns(torch.tensor([2])).tolist() == list(range(18, 27))
    torch.testing.assert_close(seen.of_channels(seen.weight.sum(0)), weight.double().sum((0, 2, 3)))
    kept = torch.tensor([1, 4])
    fit = seen.fit(kept, seen.weight[:, seen.columns(kept)], seen.bias)
    torch.testing.assert_close(fit.consumers[0].float(), weight[:, kept])


def test_a_head_has_a_column_for_each_of_its_features() -> None:
    model, sites, _ = language()
    site = next(site for site in sites if site.kind == "heads")
    seen = View(model, site)
    assert len(seen.columns(torch.tensor([0, 1]))) == 2 * site.block
    assert not seen.bias.any()


def test_a_fit_has_an_intercept_where_the_consumer_can_hold_it() -> None:
    model, site, _ = channels()
    assert not View(model, site).intercept
    model, sites, _ = images()
    assert View(model, sites[0]).intercept


def test_numbers_that_need_data_say_so() -> None:
    model, site, _ = channels()
    with pytest.raises(FitError, match="0: this needs data"):
        _ = View(model, site).mean
    assert len(View(model, find_sites(model, torch.ones(1, 4).double())[0]).magnitude) == site.width
