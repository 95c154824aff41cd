"""One site squeezed, from Gram matrices alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.site_grams import SiteGrams
from shallower.errors import FitError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.refitting import (
    collapsed_fit,
    enough_for_producers,
    error_curve,
    may_have_path,
    metric_of,
    narrowed_fit,
    price_of_path,
)
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply


def network(f: nn.Module | None = None) -> tuple[nn.Sequential, Site]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), f or nn.ReLU(), nn.Linear(16, 4)).double().eval()
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8]  # type: ignore[index]
        model[0].bias[8:] = model[0].bias[:8]  # type: ignore[index]
    (site,) = find_sites(model, torch.zeros(2, 6, dtype=torch.float64))
    return model, site


def seen(model: nn.Sequential, rows: int = 400) -> tuple[Tensor, SiteGrams]:
    x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = model[:2](x)
        return x, SiteGrams.of(z, x, model[2](z))


def error(model: nn.Sequential, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


def test_channels_that_are_copies_go_without_loss() -> None:
    model, site = network()
    x, grams = seen(model)
    entry = narrowed_fit(site, grams, metric_of(site, {}, grams), 8)
    assert set((entry.kept % 8).tolist()) == set(range(8))
    assert error(model, apply(model, Plan((entry,)), x), x) < 1e-3


def test_a_linear_site_collapses_without_loss() -> None:
    model, site = network(nn.LeakyReLU(0.999))
    x, grams = seen(model)
    entry = collapsed_fit(site, grams, metric_of(site, {}, grams))
    assert len(entry.kept) == 0
    assert error(model, apply(model, Plan((entry,)), x), x) < 1e-2


def test_a_collapse_needs_what_the_producer_reads() -> None:
    model, site = network()
    x, _ = seen(model)
    z = model[:2](x).detach()
    grams = SiteGrams.of(z, None, model[2](z).detach())
    with pytest.raises(FitError, match="full collapse"):
        collapsed_fit(site, grams, metric_of(site, {}, grams))
    assert 0 not in error_curve(site, grams, metric_of(site, {}, grams))


def test_the_curve_knows_of_copies_and_of_the_collapse() -> None:
    model, site = network()
    _, grams = seen(model)
    curve = error_curve(site, grams, metric_of(site, {}, grams))
    assert sorted(curve) == list(range(17))
    assert curve[8] < 1e-3 * curve[4]
    assert curve[0] > curve[8]


def test_widths_for_which_there_are_too_few_rows_are_not_offered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32)).eval()
    (site,) = find_sites(model, torch.zeros(2, 64))

    def offered(images: int) -> set[int]:
        x = torch.randn(images, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            z = model[:2](x)
            grams = SiteGrams.of(z, None, model[2](z))
        return set(error_curve(site, grams, metric_of(site, {}, grams)))

    assert offered(200) <= {*range(1, 64), site.width}
    assert offered(20_000) == set(range(1, site.width + 1))


def test_one_row_is_too_little() -> None:
    model, site = network()
    _, grams = seen(model, rows=1)
    with pytest.raises(FitError, match=site.name):
        metric_of(site, {}, grams)


def test_producers_are_fitted_where_there_are_rows_enough() -> None:
    _, site = network()
    assert not enough_for_producers(site, 16, 100)
    assert enough_for_producers(site, 16, 10_000)
    assert enough_for_producers(site, 1, 200)


def test_a_path_costs_what_a_channel_costs_and_less_beside_a_gate() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return out

    _, plain = network()
    (gated,) = find_sites(Gated(), torch.zeros(2, 6))
    assert may_have_path(plain)
    assert may_have_path(gated)
    assert price_of_path(plain) == 1
    assert 0.6 < price_of_path(gated) < 0.7
