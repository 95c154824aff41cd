"""Operations on images."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage


@torch.library.custom_op("shallower_tests::roi_align", mutates_args=())
def roi_align(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Reads what torchvision's operator of this name reads, which needs its compiled part."""
    return torch.stack([x[int(box[0]), :, :2, :2] for box in boxes])


@torch.library.custom_op("shallower_tests::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Likewise; its taps stay where they are."""
    return F.conv2d(x, weight, bias) + offset.sum(1, keepdim=True) * mask.sum(1, keepdim=True)


USAGES = [
    Usage("max pool", lambda x: F.max_pool2d(x, 2), "x:2,6,4,4", "x0|x1"),
    Usage("average pool", lambda x: F.avg_pool1d(x, 2), "x:2,6,4", "x0|x1"),
    Usage("global pool", lambda x: F.adaptive_avg_pool2d(x, 1), "x:2,6,4,4", "x0|x1"),
    Usage("pool of one image", lambda x: F.max_pool2d(x, 2), "x:6,4,4", "x0"),
    Usage("pool with places", lambda x: F.max_pool2d(x, 2, return_indices=True), "x:2,6,4,4", "x0|x1"),
    Usage("interpolate", lambda x: F.interpolate(x, scale_factor=2), "x:2,6,3,3", "x0|x1"),
    Usage(
        "positions of a table",
        lambda x: F.interpolate(x, size=(5, x.shape[-1]), mode="bilinear"),
        "x:2,3,4,6",
        "x0|x1|x3",
    ),
    Usage("interpolate lines", lambda x: F.interpolate(x, size=7, mode="linear"), "x:2,6,3", "x0|x1"),
    Usage(
        "grid_sample", lambda x, g: F.grid_sample(x, g, align_corners=False), "x:2,6,3,3 g:2,4,4,2", "x0 g0|x1|g1|g2"
    ),
    Usage("zeros around pixels", lambda x: F.pad(x, (1, 1, 0, 1)), "x:2,6,3,3", "x0|x1|x2|x3"),
    Usage("reflected pixels", lambda x: F.pad(x, (1, 1), mode="reflect"), "x:2,6,3", "x0|x1"),
    Usage("zeros around channels", lambda x, a=2, b=3: F.pad(x, (0, 0, a, b)), "x:2,6,3", "x0|x1|x2|out1|out1"),
    Usage(
        "a sum with padded channels", lambda x, y, a=2, b=2: F.pad(x, (a, b)) + y, "x:2,6 y:2,10", "x0 y0|x1 y1|y1|y1"
    ),
    Usage("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), "x:3,12,2,2", "x0|x1"),
    Usage("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), "x:3,6,4,4", "x0|x1"),
    Usage("channel shuffle", lambda x, g=2: F.channel_shuffle(x, g), "x:3,6,2,2", "x0|x1|x2|x3"),
    Usage("patches", lambda x: F.unfold(x, 2), "x:3,6,3,3", "x0|x1"),
    Usage("stretches from the end", lambda x: x.unfold(dimension=-2, size=2, step=1), "x:3,4,6", "x0|x2"),
    Usage("regions", lambda x, b: roi_align(x, b), "x:3,6,4,4 b:int2:3,5", "x1"),
    Usage(
        "deformed convolution",
        lambda x, w, o, m, b: deform_conv2d(x, w, o, m, b),
        "x:2,6,4,4 w:4,6,2,2 o:2,8,3,3 m:2,4,3,3 b:4",
        "x0 o0 m0|x1 w1|w0 b0",
    ),
    Usage("a text pooled as an image", lambda x: F.max_pool2d(x[:, None], (2, 1), stride=(2, 1)), "x:2,4,6", "x0|x2"),
    Usage("averages of positions", lambda x: F.avg_pool2d(x, (3, 1), (1, 1), (1, 0)), "x:2,3,4,6", "x0|x1|x3"),
    Usage("cut pixels", lambda x: F.pad(x, (-1, 0)), "x:3,6,4", "x0|x1"),
    Usage("stretches", lambda x: x.unfold(2, 2, 1), "x:3,6,4", "x0|x1"),
    Usage("patches and back", lambda x: F.fold(F.unfold(x, 2), (3, 3), 2), "x:3,6,3,3", "x0|x1"),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()
