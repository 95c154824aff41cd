"""The plan on the original layers: what surgery must equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def chain(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).to(dtype), torch.randn(4, 3, dtype=dtype)


def test_every_channel_does_what_its_fate_says() -> None:
    model, x = chain()
    site = find_sites(model, x)[0]
    fates = torch.tensor([Fate.KEEP] * 3 + [Fate.LINEAR] * 3 + [Fate.DROP] * 2)
    slopes, offsets = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    simulated = simulate(model, Plan((Entry(site, fates, slopes, offsets),)))
    h = model[0](x)
    z = torch.cat([model[1](h[:, :3]), (h * slopes + offsets)[:, 3:6], offsets[6:].expand(4, 2)], 1)
    assert torch.allclose(simulated(x), model[2:](z))
    assert [p.shape for p in simulated.parameters()] == [p.shape for p in model.parameters()]


def test_a_fitted_producer_goes_on_with_what_an_earlier_entry_leaves_it() -> None:
    """The constants of channels that were dropped, or the bias that was fitted, stay in its bias."""
    model, x = chain()
    first, second = find_sites(model, x)
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    refitted = Entry.narrow(second, torch.arange(6), fit=Fit((normal(2, 6),), (normal(2),), producer=normal(6, 5)))
    for earlier in (
        Entry.narrow(first, torch.arange(5), normal(8)),
        Entry.narrow(first, torch.arange(5), fit=Fit((normal(6, 5),), (normal(6),))),
    ):
        plan = Plan((earlier, refitted))
        assert torch.allclose(simulate(model, plan)(x), apply(model, plan, x)(x))


def path_of(site: Site, inputs: int) -> Entry:
    """A site of which nothing but a fitted linear path is left."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    out = site.consumers[0].d_out
    fit = Fit((), (normal(out),), normal(2, inputs), (normal(out, 2),))
    return Entry.narrow(site, torch.tensor([], dtype=torch.long), fit=fit)


@pytest.mark.parametrize("pixels", [[nn.Flatten()], [nn.AdaptiveAvgPool2d(1), nn.Flatten()]])
def test_a_path_reads_the_pixels_that_a_merged_map_in_front_of_it_reads(pixels: list[nn.Module]) -> None:
    torch.manual_seed(0)
    head = [nn.Linear(4 * (4 if len(pixels) == 1 else 1), 5), nn.ReLU(), nn.Linear(5, 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *pixels, *head).double()
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    first, second = find_sites(model, x)
    inputs = 12 if len(pixels) == 1 else 3
    plan = Plan((Entry.collapse(first, becomes="merged"), path_of(second, inputs)))
    assert torch.allclose(simulate(model, plan)(x), apply(model, plan, x)(x))


def test_a_path_reads_what_is_left_in_front_of_a_merged_map() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)]
    model, x = nn.Sequential(*layers).double(), torch.randn(4, 3, dtype=torch.float64)
    zero, first, second = find_sites(model, x)
    plan = Plan((Entry.narrow(zero, torch.arange(5)), Entry.collapse(first, becomes="merged"), path_of(second, 5)))
    assert torch.allclose(simulate(model, plan)(x), apply(model, plan, x)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_path_that_reads_another_path_is_refused_by_simulation_and_surgery_alike(dtype: torch.dtype) -> None:
    model, x = chain(dtype)
    first, second = find_sites(model, x)
    pair = Fit((), (torch.zeros(6),), torch.randn(2, 3), (torch.randn(6, 2),))
    path = Fit((), (torch.zeros(2),), torch.randn(1, 2), (torch.randn(2, 1),))
    entries = []
    for site, fit, becomes in ((first, pair, "pair"), (second, path, "pair")):
        linear = torch.ones(site.width, dtype=torch.int8)
        entries.append(Entry(site, linear, torch.ones(site.width), torch.zeros(site.width), fit=fit, becomes=becomes))
    plan = Plan(tuple(entries))
    for function in (lambda: simulate(model, plan), lambda: apply(model, plan, x)):
        with pytest.raises(PlanError, match="Apply that entry first"):
            function()


def test_the_model_is_left_alone() -> None:
    model, x = chain()
    before = model(x)
    simulate(model, Plan.collapse(find_sites(model, x)))
    assert torch.equal(model(x), before)
    assert not model[0]._forward_hooks
