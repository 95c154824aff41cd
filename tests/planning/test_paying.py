"""Which sites are worth collapsing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.planning.paying import paying
from shallower.planning.plan import CostWarning, Plan
from shallower.sites import Sites
from shallower.surgery.padding import move_padding
from tests.networks import AfterSum, Inverted


def image(channels: int, size: int = 8) -> torch.Tensor:
    return torch.randn(1, channels, size, size)


def inverted() -> tuple[nn.Module, Sites, torch.Tensor]:
    model = Inverted(4, 24, 3, 1, 1, nn.ReLU6(), residual=False).eval()
    return model, find_sites(model, image(4)), image(4)


def names(sites: Sites, unit: str = "") -> list[str]:
    return [site.name for site in paying(sites, unit)[0]]  # type: ignore[arg-type]


def test_a_widening_pair_pays_and_a_narrow_one_does_not():
    wide = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    narrow = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
    assert names(find_sites(wide, torch.randn(2, 4))) == ["0"]
    sites = find_sites(narrow, torch.randn(2, 16))
    assert names(sites) == []
    assert paying(sites)[1]["0"].startswith("no layer becomes cheaper when it collapses: one layer would have")


def test_padded_convolutions_do_not_pay_and_the_reason_names_the_remedy():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 4, 3, padding=1)).eval()  # fmt: skip
    sites = find_sites(model, image(4))
    assert names(sites) == []  # though the BatchNorm that folds has parameters
    assert "move_padding" in paying(sites)[1][sites[0].name]


def test_a_depthwise_convolution_between_pays_together_with_its_neighbours_only():
    model, sites, x = inverted()
    assert names(sites) == []
    moved = find_sites(move_padding(model, sites.select(lambda site: not site.between)), x)
    short = [site.name for site in moved if not site.between]
    assert names(moved) == short
    assert [names(moved.select(name)) for name in short] == [[], []]


def test_sites_that_cannot_be_linear_and_places_never_pay():
    chosen, reasons = paying(find_sites(AfterSum(), torch.randn(2, 8), kinds=("hidden", "activation")))
    assert chosen == ()
    assert reasons == {"act": "no layers merge when it goes"}


@pytest.mark.parametrize(("unit", "expected"), [("params", []), ("macs", ["0"]), ("", ["0"])])
def test_the_unit_says_what_has_to_become_less(unit, expected):
    # the merged layer has the weights of the two, and runs on a quarter of the first one's pixels
    model = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 4, 1, stride=2, bias=False))
    assert names(find_sites(model, image(4)), unit) == expected


def test_a_plan_that_takes_activations_away_for_nothing_warns():
    _, sites, _ = inverted()
    with pytest.warns(CostWarning, match="the activation goes and the layers stay as they are"):
        Plan.collapse(sites.select(lambda site: not site.between))


def test_a_plan_of_sites_that_pay_does_not_warn():
    model, sites, x = inverted()
    moved = find_sites(move_padding(model, sites.select(lambda site: not site.between)), x)
    Plan.collapse(moved.select(lambda site: not site.between))
