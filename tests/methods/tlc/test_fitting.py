"""Kernels and narrower pairs fitted to two layers in a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import FitError
from shallower.methods.tlc.fitting import fitted_kernel, narrowed_pair, patch_gram
from shallower.sites import LinearMap


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (1, 1), (1, 1)), ((3, 1), (2, 1), (0, 1)), ((1, 1), (1, 1), (0, 0))]
)
def test_a_kernel_is_found_again_from_what_it_answers(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    conv = nn.Conv2d(3, 5, kernel, stride, padding).double()
    m = LinearMap("c", "conv2d", 3, 5, True, 0, kernel, stride, padding)
    x = torch.randn(12, 3, 9, 9, dtype=torch.float64)
    first, second, third = (patch_gram(m, part, conv(part)) for part in x.split(4))
    weight, bias = fitted_kernel(m, first + second + third, ridge=1e-12)
    torch.testing.assert_close(weight, conv.weight.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, conv.bias.detach(), rtol=1e-6, atol=1e-8)


def test_a_fitted_kernel_is_the_least_squares_one() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    m = LinearMap("c", "conv2d", 8, 8, True, 0, (3, 3), (1, 1), (1, 1))
    x = torch.randn(8, 8, 16, 16)
    with torch.no_grad():
        y = second(first(x))
    weight, bias = fitted_kernel(m, patch_gram(m, x, y))
    best = (nn.functional.conv2d(x, weight.float(), bias.float(), padding=1) - y).square().sum()
    for _ in range(3):
        other = weight.float() + 0.01 * torch.randn_like(weight.float())
        assert (nn.functional.conv2d(x, other, bias.float(), padding=1) - y).square().sum() > best


def test_a_pair_of_full_width_is_narrowed_without_loss() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4).double(), nn.Linear(4, 9).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        z = first(x)
        fit = narrowed_pair(first, second, z.T @ z / 200, z.mean(0), 4)
        assert fit.down is not None
        assert fit.down_bias is not None
        found = (x @ fit.down.T + fit.down_bias) @ fit.ups[0].T + fit.biases[0]
        torch.testing.assert_close(found, second(z))


def test_a_narrowed_pair_errs_by_the_singular_values_left_out() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(12, 10, bias=False).double(), nn.Linear(10, 9, bias=False).double()
    x = torch.randn(5000, 12, dtype=torch.float64)
    with torch.no_grad():
        z = first(x)
        moments = z.T @ z / len(z)
        fit = narrowed_pair(first, second, moments, torch.zeros(10, dtype=torch.float64), 3)
        assert fit.down is not None
        error = ((x @ fit.down.T) @ fit.ups[0].T - second(z)).square().sum(1).mean()
        values, vectors = torch.linalg.eigh(moments)
        singular = torch.linalg.svdvals(second.weight @ (vectors * values.clamp_min(0).sqrt()))
    assert float(error) == pytest.approx(float(singular[3:].square().sum()), rel=1e-6)


def test_nothing_to_fit_on_is_an_error() -> None:
    m = LinearMap("conv", "conv2d", 3, 5, True, 0)
    with pytest.raises(FitError, match="conv: only 0 positions were seen"):
        fitted_kernel(m, patch_gram(m, torch.zeros(0, 3, 4, 4), torch.zeros(0, 5, 4, 4)))
    broken = patch_gram(m, torch.full((2, 3, 4, 4), torch.nan), torch.zeros(2, 5, 4, 4))
    with pytest.raises(FitError, match="conv: a value is not finite"):
        fitted_kernel(m, broken)
