"""Weights that are computed of a length and a direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shallower.modules.prepared.weight_norms import hold_plainly, is_weight_norm, place_of_weight, weight_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")
BOTH = pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, lambda *args, **named: nn.utils.weight_norm(*args, **named)]
)
Norm = Callable[..., nn.Module]


@BOTH
@pytest.mark.parametrize("dim", [0, 1, None])
def test_what_is_left_of_a_weight_is_what_it_was(norm: Norm, dim: int | None) -> None:
    layer = norm(nn.Linear(6, 4), dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    layer(torch.zeros(1, 6))
    (found,) = weight_norms(layer)
    length, direction = (layer.get_parameter(name).detach() for name in (found.length, found.direction))
    cut = direction[:, [0, 2, 5]]
    if dim == 1:
        cut, direction = direction[[1, 3]], direction
    resized = found.resized(length, direction, cut)
    rows = layer.weight[[1, 3]] if dim == 1 else layer.weight[:, [0, 2, 5]]
    torch.testing.assert_close(torch._weight_norm(cut, resized, found.dim), rows)


@BOTH
def test_the_computed_weight_is_held_and_the_original_stays(norm: Norm) -> None:
    model = nn.Sequential(norm(nn.Conv1d(4, 6, 3)), nn.ReLU())
    (found,) = weight_norms(model)
    x, weight = torch.randn(2, 4, 5), model[0].weight.detach().clone()
    y = model(x)
    hold_plainly(model, found)
    assert torch.equal(model.get_parameter(found.direction), weight)
    torch.testing.assert_close(model(x), y)
    with torch.no_grad():
        model.get_parameter(found.direction).zero_()
    assert torch.equal(model(x)[0, :, 0], model[0].bias.relu())


@BOTH
def test_where_a_weight_is(norm: Norm) -> None:
    layer = norm(nn.Linear(6, 4))
    (found,) = weight_norms(layer)
    holder, attribute = place_of_weight(layer)
    assert getattr(holder, attribute) is layer.get_parameter(found.direction)
    plain = nn.Linear(6, 4)
    assert place_of_weight(plain) == (plain, "weight")


def test_what_is_no_weight_norm() -> None:
    layer: Any = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    assert list(weight_norms(layer)) == []
    assert not any(map(is_weight_norm, layer.modules()))
    assert place_of_weight(layer) == (layer.parametrizations.weight, "original")
