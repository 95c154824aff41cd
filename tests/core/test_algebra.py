"""Pure functions of tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from shallower.core.algebra import (
    compose,
    grouped,
    norm_as_affine,
    response,
    scale_rows,
    ungrouped,
    unrolled,
    wide,
    with_skip,
)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_composed_matrices_do_what_both_do():
    outer, inner, x = double(3, 5), double(5, 4, seed=1), double(4, seed=2)
    assert torch.allclose(compose(outer, inner) @ x, outer @ (inner @ x))


@settings(max_examples=40)
@given(
    kernels=st.tuples(*[st.integers(1, 3)] * 4),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(*[st.integers(1, 2)] * 4),
)
def test_composed_convolutions_do_what_both_do(kernels, stride, dilations):
    inner, outer = double(4, 3, *kernels[:2]), double(2, 4, *kernels[2:], seed=1)
    d1, d2 = dilations[:2], dilations[2:]
    x = double(1, 3, 17, 17, seed=2)
    expected = F.conv2d(F.conv2d(x, inner, stride=stride, dilation=d1), outer, dilation=d2)
    merged = compose(outer, inner, stride=stride, inner_dilation=d1, outer_dilation=d2)
    dilation = [stride[i] * d2[i] if kernels[i] == 1 else d1[i] if kernels[2 + i] == 1 else 1 for i in (0, 1)]
    found = F.conv2d(x, merged, stride=stride, dilation=dilation)
    # a stride may leave a last row that only one of the two ways reaches
    rows, columns = expected.shape[2:]
    assert torch.allclose(found[:, :, :rows, :columns], expected)


@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_is_a_scale_and_a_shift(affine):
    norm = nn.BatchNorm1d(4, affine=affine).double().eval()
    norm.running_mean.copy_(double(4))
    norm.running_var.copy_(double(4).square())
    scale, shift = norm_as_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    x = double(3, 4, seed=1)
    assert torch.allclose(norm(x), x * scale + shift)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_convolution_as_a_dense_one(groups):
    convolution = nn.Conv2d(4, 8, 3, groups=groups, bias=False).double()
    x = double(1, 4, 6, 6)
    assert torch.allclose(convolution(x), F.conv2d(x, ungrouped(convolution.weight, groups)))


@settings(max_examples=40)
@given(
    groups=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (4, 4), (8, 4), (8, 8), (1, 8)]),
    kernels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
)
def test_composed_grouped_convolutions_have_the_common_divisor_of_their_groups(groups, kernels, stride):
    (g1, g2), (k1, k2) = groups, kernels
    inner, outer = double(8, 8 // g1, k1, k1), double(8, 8 // g2, k2, k2, seed=1)
    x = double(1, 8, 9, 9, seed=2)
    expected = F.conv2d(F.conv2d(x, inner, stride=stride, groups=g1), outer, groups=g2)
    common = math.gcd(g1, g2)
    merged = grouped(compose(ungrouped(outer, g2), ungrouped(inner, g1), stride=(stride, stride)), common)
    found = F.conv2d(x, merged, stride=stride, dilation=stride if k1 == 1 else 1, groups=common)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@settings(max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.integers(0, 2),
    biases=st.booleans(),
    beyond=st.integers(0, 3),
)
def test_conv_batchnorm_conv_is_one_convolution_where_all_padding_is_in_front(sizes, strides, padding, biases, beyond):
    k1, k2, d1, d2 = sizes
    s1 = strides[0]
    first = nn.Conv2d(3, 5, k1, s1, padding, d1, bias=biases).double()
    norm, second = nn.BatchNorm2d(5).double().eval(), nn.Conv2d(5, 4, k2, strides[1], 0, d2).double()
    norm.running_mean.copy_(double(5))
    norm.running_var.copy_(double(5).square())
    # the least image that the second convolution can read, or a little more: the merged kernel fits wherever both do
    size = max(1, s1 * d2 * (k2 - 1) + d1 * (k1 - 1) + 1 - 2 * padding) + beyond
    x = double(2, 3, size, size, seed=3)
    scale, shift = norm_as_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    constant = shift if first.bias is None else shift + scale * first.bias
    weight = compose(
        second.weight,
        scale_rows(first.weight, scale),
        stride=(s1, s1),
        inner_dilation=(d1, d1),
        outer_dilation=(d2, d2),
    )
    dilation = s1 * d2 if k1 == 1 and k2 > 1 else d1 if k2 == 1 else 1
    bias = second.bias + response(second.weight, constant)
    expected = second(norm(first(x)))
    found = F.conv2d(x, weight, bias, s1 * strides[1], padding, dilation)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@settings(max_examples=20)
@given(k=st.integers(1, 3), stride=st.integers(1, 2), size=st.integers(4, 8))
def test_a_linear_layer_over_flattened_channels_goes_into_the_convolution_before_it(k, stride, size):
    inner = double(3, 2, k, k)
    x = double(2, 2, size, size, seed=2)
    h = F.conv2d(x, inner, stride=stride)
    linear = double(4, h[0].numel(), seed=1)
    merged = compose(linear.unflatten(1, h.shape[1:]), inner, stride=(stride, stride))
    found = F.conv2d(x, merged, stride=stride, dilation=stride if k == 1 and h.shape[2] > 1 else 1).flatten(1)
    assert torch.allclose(found, F.linear(h.flatten(1), linear), rtol=1e-10)


@settings(max_examples=20)
@given(
    k=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
)
def test_a_padded_convolution_goes_into_the_linear_layer_over_all_its_pixels(k, stride, padding, dilation, size):
    inner, x = double(3, 2, k, k), double(2, 2, *size, seed=2)
    h = F.conv2d(x, inner, None, stride, padding, dilation)
    linear = double(4, h[0].numel(), seed=1)
    steps = {"stride": (stride, stride), "padding": (padding, padding), "dilation": (dilation, dilation)}
    merged = unrolled(linear, inner, size, tuple(h.shape[2:]), **steps)
    assert torch.allclose(F.linear(x.flatten(1), merged), F.linear(h.flatten(1), linear), rtol=1e-10)


@pytest.mark.parametrize("k", [1, 3])
def test_a_linear_layer_behind_global_average_pooling_goes_into_the_convolution_before_it(k):
    inner, linear, x = double(3, 2, k, k), double(4, 3, seed=1), double(2, 2, 6, 6, seed=2)
    h = F.conv2d(x, inner)
    expected = F.linear(h.mean((2, 3)), linear)
    mean = (linear / h[0, 0].numel())[:, :, None, None].expand(-1, -1, *h.shape[2:])
    found = F.conv2d(x, compose(mean, inner)).flatten(1)
    assert torch.allclose(found, expected, rtol=1e-10)
    if k == 1:  # commutes with the mean
        assert torch.allclose(F.linear(x.mean((2, 3)), compose(linear, inner[:, :, 0, 0])), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 1, 1), (3, 3, 5, 3)])
def test_a_skip_is_one_more_in_the_centre_of_the_kernel(shape):
    weight, x = double(*shape), double(2, 3, 7, 7, seed=1)
    if len(shape) == 2:
        assert torch.allclose(with_skip(weight) @ x[0, :, 0], (weight @ x[0, :, 0]) + x[0, :, 0])
    else:
        padding = (shape[2] // 2, shape[3] // 2)
        expected = F.conv2d(x, weight, padding=padding) + x
        assert torch.allclose(F.conv2d(x, with_skip(weight), padding=padding), expected)


def test_rows_are_scaled():
    weight, rows = double(2, 3), double(2, seed=1)
    assert torch.equal(scale_rows(weight, rows), torch.diag(rows) @ weight)


def test_a_convolution_answers_a_constant_with_the_sum_of_its_taps():
    weight, constant = double(2, 3, 2, 2), double(3, seed=1)
    image = constant[None, :, None, None].expand(1, 3, 4, 4)
    assert torch.allclose(F.conv2d(image, weight)[0, :, 0, 0], response(weight, constant))


def test_wide_numbers_are_float64():
    assert wide(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
