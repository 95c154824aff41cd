"""Models that call their layers and activations by PyTorch's own keyword, `input`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.planning.entries import Entry, Fate
from shallower.planning.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


class ByKeyword(nn.Module):
    def __init__(self, a: nn.Module | None = None, norm: nn.Module | None = None, b: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.norm, self.b = a or nn.Linear(6, 8), norm or nn.Identity(), b or nn.Linear(8, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(input=self.act(input=self.norm(input=self.a(input=x))))
        return result


def convolutional() -> ByKeyword:
    return ByKeyword(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3))


@pytest.mark.parametrize(("make", "shape"), [(ByKeyword, (20, 6)), (convolutional, (20, 6, 4, 4))])
def test_every_fate_is_applied_saved_and_loaded(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(*shape)
    (site,) = sh.find_sites(model, x)
    fates = torch.tensor([Fate.KEEP] * 3 + [Fate.LINEAR] * 2 + [Fate.DROP] * 3)
    entry = Entry(site, fates, torch.rand(8), torch.rand(8))
    for plan in (Plan((entry,)), Plan((Entry.narrow(site, torch.arange(4)),)), Plan.collapse([site])):
        small = sh.apply(model, plan, x)
        sh.save(small, tmp_path / "small")
        assert torch.equal(sh.load(tmp_path / "small", model=make()).eval()(x), small(x))


@pytest.mark.parametrize(("make", "shape"), [(ByKeyword, (20, 6)), (convolutional, (20, 6, 4, 4))])
def test_methods_attach_to_them(make: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    for attached, options in (
        (sh.LayerCollapse, {}),
        (sh.StructuralDropout, {}),
        (sh.TillLayersCollapse, {"batches": [x]}),
    ):
        model = make()
        attached(model, sh.find_sites(model, x), **options)
        F.mse_loss(model(x), torch.zeros_like(model(x))).backward()
