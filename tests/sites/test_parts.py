"""The parts of a site: what they cost and how they are called."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shallower.sites import LinearMap, Place, Tally, by_name, tally


def test_a_place_is_a_module_or_a_call() -> None:
    assert str(Place("block.act")) == "block.act"
    assert str(Place("block", (("relu", 1),))) == "block:relu#1"
    assert str(Place("", (("gelu", 0), ("mul", 2)))) == "model:gelu#0"


def test_a_place_names_the_modules_that_are_called_there() -> None:
    assert Place("block.act").modules == ("block.act",)
    assert Place("block", (("relu", 1),)).modules == ()
    assert Place("block", (("self.act", 1), ("mul", 0))).modules == ("block.act",)
    assert Place("", (("self.inner.act", 0),)).modules == ("inner.act",)


def test_costs_of_maps_add_up() -> None:
    maps = [LinearMap("a", "linear", 2, 3, True, 10), LinearMap("b", "linear", 3, 4, False, 5)]
    assert tally(maps) == Tally(weights=6 + 12, params=9 + 12, macs=60 + 60)
    assert tally([]) == (0, 0, 0)


def test_maps_are_found_by_name_each_once() -> None:
    first, second = (LinearMap(name, "linear", 2, 2, True, 1) for name in "ab")
    assert list(by_name([first, second, first]).items()) == [("a", first), ("b", second)]


@given(
    groups=st.sampled_from([1, 2]), bias=st.booleans(), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip
def test_a_convolution_has_the_parameters_and_products_that_pytorch_gives_it(
    groups: int, bias: bool, kernel: tuple[int, int]
) -> None:
    conv = nn.Conv2d(4, 6, kernel, groups=groups, bias=bias)
    with torch.no_grad():
        y = conv(torch.randn(2, 4, 7, 7))
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    m = LinearMap("c", "conv2d", 4, 6, bias, positions, kernel=kernel, groups=groups)
    assert m.params == sum(p.numel() for p in conv.parameters())
    assert m.macs == positions * conv.weight.numel()
    assert m.taps == kernel[0] * kernel[1]
