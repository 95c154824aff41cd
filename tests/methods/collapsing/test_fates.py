"""What slopes become in a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.errors import MethodError
from shallower.methods.collapsing.fates import Fates, unsharded
from shallower.modules.activations import SlopeActivation


def attached(granularity: str = "channel") -> tuple[nn.Module, sh.Site, SlopeActivation]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    (site,) = sh.find_sites(model, torch.randn(3, 4))
    method = sh.LayerCollapse(model, sh.find_sites(model, torch.randn(3, 4)), granularity=granularity, include="*")  # type: ignore[arg-type]
    (activation,) = method.activations.values()
    return model, site, activation


def set_slope(activation: SlopeActivation, values: torch.Tensor) -> None:
    with torch.no_grad():
        activation.slope.copy_(values)


def test_channels_within_the_tolerance_are_linear_and_the_others_keep_their_slope() -> None:
    model, site, activation = attached()
    slopes = torch.tensor([1.0, 0.96, 0.5, 0.0] * 2)
    set_slope(activation, slopes)
    entry = Fates(model, 0.05, unit=True).entry(site, activation)
    assert entry is not None
    assert entry.fates.tolist() == [sh.Fate.LINEAR, sh.Fate.LINEAR, sh.Fate.KEEP, sh.Fate.KEEP] * 2
    assert entry.alphas is not None
    torch.testing.assert_close(entry.alphas, slopes.double())


def test_an_activation_that_never_moved_is_in_no_plan() -> None:
    model, site, activation = attached()
    assert Fates(model, 0.05).entry(site, activation) is None


def test_the_line_is_the_nearest_under_the_batch_norm_before_it() -> None:
    model, site, activation = attached("site")
    set_slope(activation, torch.tensor([0.96]))
    nearest, unit = (Fates(model, 0.05, unit=unit).entry(site, activation) for unit in (False, True))
    assert nearest is not None
    assert unit is not None
    # beta = 0: half of the inputs are negative
    torch.testing.assert_close(nearest.slopes, torch.full((8,), 0.98, dtype=torch.float64))
    assert torch.equal(unit.slopes, torch.ones(8, dtype=torch.float64))


def test_a_norm_that_is_none_any_more_is_an_error() -> None:
    model, site, activation = attached("site")
    set_slope(activation, torch.tensor([1.0]))
    model.set_submodule("1", nn.Identity())
    with pytest.raises(MethodError, match="not a BatchNorm any more"):
        Fates(model, 0.05).entry(site, activation)


def test_a_slope_that_is_not_sharded_is_itself() -> None:
    slope = torch.ones(3)
    assert unsharded(slope) is slope
