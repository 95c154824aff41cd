"""Calls of a forward become a module that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import Refusal
from shallower.modules.graphs import Forwards, forwards_of
from shallower.modules.regions import STOCK, Region, module_of, region_of


class Runs(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.act = run, nn.GELU()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def made(run: Callable[[Any, Tensor], Tensor], *calls: tuple[str, int]) -> nn.Module | Refusal:
    model = Runs(run)
    forwards = forwards_of(model)
    assert isinstance(forwards, Forwards)
    regions: list[Region] = []
    for graph in forwards.graphs:
        region = region_of(graph, calls)
        if isinstance(region, Refusal):
            return region
        regions.append(region)
    return module_of(model, regions)


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_module_computes_what_its_function_does(name: str) -> None:
    function = getattr(F, name.replace("log_", "log"))
    x = torch.linspace(-3, 3, 31)
    module = made(lambda _, x: function(x), (name, 0))
    assert isinstance(module, nn.Module)
    assert torch.equal(STOCK[name]()(x), function(x))
    assert torch.equal(module(x), function(x))


@pytest.mark.parametrize(
    ("run", "calls"),
    [
        (lambda _, x: x * torch.sigmoid(1.7 * x), (("mul", 0), ("sigmoid", 0), ("mul", 1))),
        (lambda m, x: m.act(x) * 2, (("self.act", 0), ("mul", 0))),
        (lambda m, x: m.act(x), (("self.act", 0),)),
        (lambda _, x: F.leaky_relu(x, 0.3), (("leaky_relu", 0),)),
    ],
)
def test_several_calls_become_one_module(
    run: Callable[[Any, Tensor], Tensor], calls: tuple[tuple[str, int], ...]
) -> None:
    x = torch.linspace(-3, 3, 31)
    module = made(run, *calls)
    assert isinstance(module, nn.Module)
    assert torch.equal(module(x), Runs(run)(x))


def test_a_sum_of_two_tensors_is_a_module_of_two_arguments() -> None:
    module = made(lambda m, x: m.act(x) + x, ("add", 0))
    assert isinstance(module, nn.Module)
    assert torch.equal(module(torch.ones(2), torch.ones(2)), 2 * torch.ones(2))


@pytest.mark.parametrize(
    ("run", "calls", "reason"),
    [
        (lambda _, x: F.relu(x), (("relu", 1),), "does not make these calls"),
        (lambda _, x: F.relu(x) * F.silu(x), (("mul", 0),), "more than one tensor"),
        (lambda _, x: F.relu(x) * 2 + F.relu(x), (("relu", 0), ("add", 0)), "more than one tensor"),
        (lambda m, x: F.prelu(m.act(x), m.scale), (("prelu", 0),), "more than one tensor"),
        (lambda m, _: F.relu(m.scale), (("relu", 0),), "reads a parameter"),
        (lambda m, x: F.dropout(x, training=not m.training), (("dropout", 0),), "does not follow the mode"),
    ],
)
def test_what_cannot_be_one_module_is_refused(
    run: Callable[[Any, Tensor], Tensor], calls: tuple[tuple[str, int], ...], reason: str
) -> None:
    refusal = made(run, *calls)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
