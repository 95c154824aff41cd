"""Kernels, strides and paddings of maps in a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shallower.errors import PlanError
from shallower.planning.geometry import composed, fitted_map, kernel_of, not_foldable
from shallower.sites import LinearMap

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def conv(name: str, d_in: int, d_out: int, **geometry: tuple[int, int]) -> LinearMap:
    return LinearMap(name, "conv2d", d_in, d_out, True, 1, size=(12, 12), **geometry)  # type: ignore[arg-type]


def module(m: LinearMap) -> nn.Conv2d:
    return nn.Conv2d(m.d_in, m.d_out, m.kernel, m.stride, m.padding, m.dilation, groups=m.groups)


@given(k1=pairs, k2=pairs, s1=pairs, s2=pairs, p1=st.integers(0, 1), d=st.integers(1, 2))
def test_one_map_gives_the_size_that_two_in_a_row_give(
    k1: tuple[int, int], k2: tuple[int, int], s1: tuple[int, int], s2: tuple[int, int], p1: int, d: int
) -> None:
    first = conv("a", 2, 3, kernel=k1, stride=s1, padding=(p1, p1))
    second = conv("b", 3, 4, kernel=k2, stride=s2, dilation=(d, d))
    merged = composed(first, second, True)
    x = torch.randn(1, 2, 24, 24)
    with torch.no_grad():
        assert module(merged)(x).shape == module(second)(module(first)(x)).shape
    assert (merged.name, merged.d_in, merged.d_out) == ("b", 2, 4)


@given(k=st.integers(1, 5))
def test_a_fitted_kernel_keeps_the_size_or_is_refused(k: int) -> None:
    first = conv("a", 2, 3, kernel=(3, 3), padding=(1, 1))
    second = conv("b", 3, 2, kernel=(3, 3), padding=(1, 1))
    x = torch.randn(1, 2, 12, 12)
    if k % 2 == 0:
        with pytest.raises(PlanError, match="no padding"):
            fitted_map(first, second, (k, k))
        return
    with torch.no_grad():
        assert module(fitted_map(first, second, (k, k)))(x).shape == module(second)(module(first)(x)).shape


def test_a_convolution_and_a_linear_layer_are_not_one() -> None:
    linear = LinearMap("b", "linear", 3, 2, True, 1)
    with pytest.raises(PlanError, match="do not merge"):
        composed(conv("a", 2, 3, kernel=(3, 3)), linear, True)
    assert composed(conv("a", 2, 3), linear, True).d_in == 2  # pointwise, behind an average
    with pytest.raises(PlanError, match="no kernel"):
        fitted_map(linear, LinearMap("c", "linear", 2, 5, True, 1), (3, 3))


def test_a_flattened_image_is_read_as_the_producer_reads_it() -> None:
    first = LinearMap("a", "conv2d", 2, 3, True, 1, kernel=(3, 3), size=(6, 5))
    merged = composed(first, LinearMap("b", "linear", 3 * 4 * 3, 7, True, 1), True, flattened=True)
    assert (merged.d_in, merged.d_out, merged.size) == (2 * 6 * 5, 7, (6, 5))


@pytest.mark.parametrize(
    ("m", "foldable"),
    [
        (conv("a", 3, 3, kernel=(3, 3), padding=(1, 1)), True),
        (conv("a", 3, 3, kernel=(3, 3), padding=(2, 2), dilation=(2, 2)), True),
        (conv("a", 3, 3, kernel=(3, 3)), False),
        (conv("a", 3, 3, kernel=(2, 2), padding=(1, 1)), False),
        (conv("a", 3, 4), False),
        (conv("a", 3, 3, stride=(2, 2)), False),
    ],
)
def test_where_the_identity_is_a_kernel(m: LinearMap, foldable: bool) -> None:
    assert (not not_foldable(m)) == foldable


def test_the_kernel_of_a_weight() -> None:
    assert kernel_of(torch.zeros(2, 3)) == (1, 1)
    assert kernel_of(torch.zeros(2, 3, 5, 4)) == (5, 4)
