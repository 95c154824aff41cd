"""Arguments of a library's builder that make a model as it is after surgery."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import shallower as sh
from benchmarks.zoo import KINDS, together
from shallower.saving.description import Stock
from shallower.saving.reading import read_description
from shallower.saving.stock.builders import call_that_builds

IMAGES = torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def convnext() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", num_classes=7).eval()


def test_stages_of_half_the_width_are_an_argument(convnext: nn.Module, tmp_path: Path) -> None:
    sites = sh.find_sites(convnext, IMAGES, kinds=KINDS)
    small = sh.apply(convnext, sh.Plan(tuple(together(convnext, sites))), IMAGES)
    sh.save(small, tmp_path / "out", source="timm:convnext_atto?num_classes=7")
    said = str(read_description(tmp_path / "out").stock)
    assert said == "the library builds this: timm.create_model('convnext_atto', num_classes=7, dims=[20, 40, 80, 160])"
    found = re.search(r"dims=\[([\d, ]+)\]", said)
    assert found
    fresh = timm.create_model("convnext_atto", num_classes=7, dims=[int(d) for d in found[1].split(",")]).eval()
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(IMAGES), small(IMAGES), rtol=1e-5, atol=1e-6)


def test_of_one_narrower_layer_nothing_is_said(convnext: nn.Module) -> None:
    site = next(site for site in sh.find_sites(convnext, IMAGES))
    small = sh.apply(convnext, sh.Plan((sh.Entry.narrow(site, torch.arange(13)),)), IMAGES)
    assert call_that_builds("timm:convnext_atto?num_classes=7", small) is None
    assert str(Stock()) == ""
