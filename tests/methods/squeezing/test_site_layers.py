"""The layers of one site, run apart from the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.methods.squeezing.site_layers import SiteLayers
from tests.methods.squeezing.test_reconstruction import NETWORKS, case


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_consumers_read_is_what_they_read_in_the_model(name: str) -> None:
    model, site, x, _ = case(name)
    layers = SiteLayers.of(model, site, torch.arange(site.width))
    assert layers is not None
    read: list[torch.Tensor] = []
    consumer = model.get_submodule(site.consumers[0].name)
    handle = consumer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        torch.testing.assert_close(layers.hidden(x), read[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_stay_are_what_they_were(name: str) -> None:
    model, site, x, _ = case(name)
    whole = SiteLayers.of(model, site, torch.arange(site.width))
    kept = torch.tensor([1, 3, 4])
    part = SiteLayers.of(model, site, kept)
    assert whole is not None
    assert part is not None
    assert part.width == 3
    with torch.no_grad():
        torch.testing.assert_close(part.hidden(x), whole.hidden(x)[:, kept], atol=1e-5, rtol=1e-5)


def test_a_linear_path_stands_beside_the_channels() -> None:
    model, site, x, _ = case("feed-forward")
    down = torch.randn(2, 6)
    layers = SiteLayers.of(model, site, torch.tensor([0, 5]), down)
    assert layers is not None
    assert layers.width == 4
    with torch.no_grad():
        torch.testing.assert_close(layers.hidden(x)[:, 2:], x @ down.T)


def test_grouped_convolutions_and_unusual_padding_are_not_run_apart() -> None:
    from shallower.finding.kinds import find_sites

    torch.manual_seed(0)
    images = torch.randn(2, 4, 8, 8)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    (site,) = find_sites(model, images)
    assert SiteLayers.of(model, site, torch.arange(8)) is None
