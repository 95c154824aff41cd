"""Layers that compute with the first channels of a site only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.methods.dropout.prefix import Width, attach_prefix, check_free, entry_at, prefix, produced
from shallower.modules import attachment
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 4, 3)).double().eval()
    return model, torch.randn(2, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("rescale", [0.0, 0.5, 1.0])
def test_the_live_model_and_the_written_one_agree(rescale: float) -> None:
    model, x = network()
    before = model(x)
    sites = find_sites(model, x)
    width = Width(8)
    places = attach_prefix(model, sites, {sites[0].name: width}, rescale=rescale)
    torch.testing.assert_close(model(x), before)
    width.live = 5
    live = model(x)
    entry = entry_at(model, sites[0], 5, rescale)
    width.live = 8
    small = apply(model, Plan((entry,)), x)
    torch.testing.assert_close(small(x), live, rtol=1e-10, atol=1e-10)
    attachment.detach(model, places)
    torch.testing.assert_close(model(x), before)


def test_training_and_evaluation_have_widths_of_their_own() -> None:
    width = Width(8)
    width.drawn, width.live = 3, 5
    assert (width.now(True), width.now(False)) == (3, 5)


def test_rows_of_the_first_channels() -> None:
    rows = torch.arange(12)
    assert prefix(rows, [(0, 2)], 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert prefix(rows, [(0, 1), (6, 1)], 2).tolist() == [0, 1, 6, 7]


def test_a_place_that_is_taken_is_refused_and_nothing_changes() -> None:
    model, x = network()
    sites = find_sites(model, x)
    attach_prefix(model, sites, {sites[0].name: Width(8)})
    with pytest.raises(MethodError, match="attached here already"):
        check_free(model, sites)


def test_a_synchronised_norm_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    sites = find_sites(model, torch.randn(1, 3, 8, 8))
    model[1] = nn.SyncBatchNorm(8).eval()
    with pytest.raises(MethodError, match="SyncBatchNorm"):
        attach_prefix(model, sites, {sites[0].name: Width(8)})
    assert type(model[0]) is nn.Conv2d


def test_the_maps_that_give_the_channels() -> None:
    model, x = network()
    ((name, blocks),) = produced(find_sites(model, x)[0])
    assert (name, blocks) == ("0", ((0, 1),))
