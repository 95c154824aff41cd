"""Models whose copies would run the original's layers are refused, and layers that lists keep are known."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.recording.holders import check_copyable, held_elsewhere
from tests.finding.linear.networks import linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


def with_lambda(model: Any) -> None:
    model.run = lambda x: model.up(x)


def with_closure(model: Any) -> None:
    model.forward = wrapped(model.forward)


def with_part(model: Any) -> None:
    model.act.forward = wrapped(functools.partial(F.relu_of, model.down))


def with_compiled_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def with_autocast(model: Any) -> None:
    model.forward = torch.autocast("cpu")(model.forward)


def with_default(model: Any) -> None:
    def run(x: Tensor, layer: nn.Module = model.up) -> Any:
        return layer(x)

    model.table = {"run": [run]}


class F:
    @staticmethod
    def relu_of(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.relu(x) if layer else x


@pytest.mark.parametrize(
    "change", [with_lambda, with_closure, with_part, with_compiled_forward, with_autocast, with_default]
)
def test_functions_that_keep_modules_are_refused_with_the_remedy(change: Callable[[Any], None]) -> None:
    model = Net()
    change(model)
    with pytest.raises(SiteError, match=r"its attribute `\w+` is a function .* Take it off"):
        find_sites(model, torch.randn(2, 4))


def bound(model: Any) -> None:
    model.forward = types.MethodType(lambda self, x: Net.forward(self, x), model)


def partial(model: Any) -> None:
    model.forward = functools.partial(Net.forward, model)


def plain_function(model: Any) -> None:
    scale = 2
    model.f = lambda x: x * scale


@pytest.mark.parametrize("change", [bound, partial, plain_function])
def test_what_a_copy_binds_anew_is_no_obstacle(change: Callable[[Any], None]) -> None:
    model, x = Net(), torch.randn(2, 4)
    change(model)
    check_copyable(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.up.weight.zero_()
        assert not torch.equal(other(x), model(x))


def test_a_compiled_part_is_no_obstacle_and_a_compiled_layer_is_skipped() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(torch.compile(Net(), backend="eager"), Net())
    assert len(linear(model, x)) == 2
    model[1].up = torch.compile(model[1].up, backend="eager")
    sites = linear(model, x)
    assert len(sites) == 1
    assert any("was compiled alone" in reason for reason in sites.skipped.values())


@pytest.mark.parametrize("kept", [list, tuple, lambda layers: {"a": [*layers]}])
def test_layers_that_a_collection_keeps_are_skipped_with_the_reason(kept: Any) -> None:
    class Listed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kept([self.up, self.act, self.down])

    model = Listed()
    assert list(held_elsewhere(model)) == [model.up, model.act, model.down]
    sites = linear(model, torch.randn(2, 4))
    assert not len(sites)
    assert "`layers` of the model, through which a forward may call it" in sites.skipped["up"]


def test_a_scripted_part_is_passed_over() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert len(linear(nn.Sequential(Net(), scripted), torch.randn(2, 4))) == 1
