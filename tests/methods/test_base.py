"""What every method has in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.errors import MethodError
from shallower.methods.base import Method, activation_of, linearisable
from tests.zoo import SwiGLU

X = torch.randn(4, 6)


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_method_that_decides_nothing_says_so() -> None:
    model = network()
    method = Method(model, sh.find_sites(model, X))
    with pytest.raises(MethodError, match="does not override plan"):
        method.plan()
    with pytest.raises(MethodError, match="no rounds of its own"):
        method.fit()


@pytest.mark.parametrize(
    "other", [network(9), SwiGLU(), nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.ReLU())]
)
def test_sites_of_another_model_are_refused(other: nn.Module) -> None:
    model = network()
    sites = sh.find_sites(model, X)
    for kind in (Method, sh.LayerCollapse, sh.LayerFolding, sh.TillLayersCollapse, sh.StructuralDropout):
        with pytest.raises(MethodError, match="another model"):
            kind(other, sites)


def test_detaching_stops_following_the_optimizer() -> None:
    model = network()
    method = sh.LayerCollapse(model, sh.find_sites(model, X))
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1)
    method.follow(optimizer)
    method.detach()
    assert not optimizer._optimizer_step_post_hooks


def test_sites_that_may_become_linear_and_the_reasons_of_the_others() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    sites = sh.find_sites(model, torch.randn(2, 3, 4, 4))
    usable = linearisable(sites)
    assert 0 < len(usable) < len(sites)
    assert all(usable.skipped[site.name] for site in sites if site not in usable)


def test_attention_heads_have_no_activation() -> None:
    model = network()
    (site,) = sh.find_sites(model, X)
    assert activation_of(site) is site.activation
