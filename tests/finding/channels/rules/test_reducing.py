"""Operations over an axis."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage

USAGES = [
    Usage("a sum", lambda x: x.sum(1), "x:2,6,3", "x0|x1|x2"),
    Usage("a sum of all", lambda x: x.sum(), "x:2,6", "x0|x1"),
    Usage("a sum of some, kept", lambda x: x.sum((0, 2), keepdim=True), "x:2,6,3", "x0|x1|x2"),
    Usage("an average of pixels", lambda x: x.mean((2, 3)), "x:2,6,3,3", "x0|x1|x2|x3"),
    Usage("an average of channels", lambda x: x - x.mean(-1, keepdim=True), "x:2,6", "x0|x1"),
    Usage("a variance", lambda x: torch.var(x, dim=1, correction=0), "x:2,6", "x0|x1"),
    Usage("both at once", lambda x: torch.var_mean(x, 1), "x:2,6", "x0|x1"),
    Usage("a length", lambda x: x.norm(dim=-1), "x:2,6", "x0|x1"),
    Usage("a length as a vector", lambda x: torch.linalg.vector_norm(x, 2, -1, keepdim=True), "x:2,6", "x0|x1"),
    Usage("global response", lambda x: x.norm(p=2, dim=(1, 2), keepdim=True), "x:2,3,3,6", "x0|x1|x2|x3"),
    Usage("the largest", lambda x: x.max(1), "x:2,6,3", "x0|x2"),
    Usage("the largest of all", lambda x: x.max(), "x:2,6", ""),
    Usage("the larger of two", lambda x, y: torch.max(x, y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("where the largest is", lambda x: x.argmax(-1), "x:2,6", "x0"),
    Usage("amax", lambda x: x.amax((2, 3)), "x:2,6,3,3", "x0|x1|x2|x3"),
    Usage("logsumexp", lambda x: x.logsumexp(0), "x:2,6", "x0|x1"),
    Usage("any", lambda x: (x > 0.5).any(1), "x:2,6", "x0|x1"),
    Usage("a loss", lambda x, y: F.mse_loss(x, y), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("losses", lambda x, y: F.huber_loss(x, y, reduction="none"), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("a loss that is added up", lambda x, y: F.l1_loss(x, y, reduction="sum"), "x:2,6 y:2,6", ""),
    Usage("kthvalue", lambda x: x.kthvalue(1, 0), "x:2,6", "x1"),
    Usage("softmax", lambda x: x.softmax(-1), "x:2,3,6", "x0|x1"),
    Usage("softmax of keywords", lambda x: F.softmax(input=x, dim=0), "x:2,3,6", "x1|x2"),
    Usage("selected kernels", lambda x: (x * x.softmax(1)).sum(1), "x:2,3,6", "x0|x2"),
    Usage("cumsum", lambda x: x.cumsum(1), "x:2,3,6", "x0|x2"),
    Usage("sort", lambda x: torch.sort(x, dim=0), "x:3,6", "x1"),
    Usage("topk", lambda x: x.topk(2, -1), "x:2,6", "x0"),
    Usage("frequencies", lambda x: torch.fft.fft(x).real, "x:2,6", "x0"),
    Usage("frequencies of an image", lambda x: torch.fft.rfft2(x, dim=(1, 2), norm="ortho").imag, "x:2,4,4,6", "x0|x3"),
    Usage("frequencies of the last two", lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), "x:2,4,4", "x0"),
    Usage("all frequencies", lambda x: torch.fft.fftn(x).real, "x:2,4", ""),
    Usage("shifted frequencies", lambda x: torch.fft.fftshift(x, dim=1), "x:2,4,6", "x0|x2"),
    Usage("diff", lambda x: torch.diff(x, dim=1), "x:2,4,6", "x0|x2"),
    Usage(
        "squeeze and excitation",
        lambda x, a, b: x * (x.mean((2, 3)) @ a @ b)[:, :, None, None],
        "x:2,6,2,2 a:6,3 b:3,6",
        "x0|x1 a0 b1|x2|x3|a1 b0",
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()
