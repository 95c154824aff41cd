"""What maps read at each position, against the maps themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.calibrating.patches import check_mask, flat, patches, thinned, unusual_padding
from shallower.core.batches import Batch
from shallower.errors import FitError
from shallower.sites import LinearMap


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_patches_times_weight_is_the_convolution(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, bias=False)
    z = torch.randn(2, 3, 8, 8)
    out = conv(z)
    m = LinearMap("c", "conv2d", 3, 5, False, 1, (kernel, kernel), (stride, stride), (padding, padding))
    rows = patches(z, m) @ conv.weight.flatten(1).T
    torch.testing.assert_close(rows, out.movedim(1, -1).reshape(-1, 5), rtol=1e-5, atol=1e-5)


def test_every_third_position_is_every_third_row() -> None:
    m = LinearMap("c", "conv2d", 3, 5, False, 1, (3, 3), (1, 1), (1, 1))
    z = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(patches(z, m, 3), patches(z, m)[::3])


def test_tokens_are_rows_whatever_the_batch() -> None:
    m = LinearMap("l", "linear", 3, 5, True, 1)
    z = torch.randn(2, 4, 3)
    assert torch.equal(patches(z, m), z.reshape(8, 3))
    assert patches(z[:0], m).shape == (0, 3)
    assert torch.equal(flat(z.movedim(-1, 1), channels_first=True), z.reshape(8, 3))


def test_only_convolutions_are_thinned() -> None:
    assert thinned(10**9, 64, taps=1) == 1
    assert thinned(10**6, 4, taps=9) == 10**6 // (256 * 4 * 9)
    assert thinned(10, 4, taps=9) == 1


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_done_beforehand(mode: str) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    pad = unusual_padding(conv)
    assert pad is not None
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(nn.functional.conv2d(pad(x), conv.weight, conv.bias), conv(x))
    assert unusual_padding(nn.Conv2d(2, 3, 3, padding=1)) is None
    assert unusual_padding(nn.Linear(2, 3)) is None


def test_a_mask_of_ones_own_is_of_the_positions_of_some_layer() -> None:
    mask = torch.ones(4, 5)
    check_mask(Batch(mask, mask, own_mask=True), [4, 20])
    check_mask(Batch(mask, mask, own_mask=True), [])
    check_mask(Batch(mask, mask), [4])
    with pytest.raises(FitError, match=r"shape \(4, 5\), 20 positions, and the layers of the sites have 4 or 16 on"):
        check_mask(Batch(mask, mask, own_mask=True), [16, 4, 4])
