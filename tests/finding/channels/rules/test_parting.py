"""Tensors side by side and parts of tensors."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage

USAGES = [
    Usage("cat", lambda x, y: torch.cat([x, y], 1), "x:2,6 y:2,4", "x0 y0|x1|y1"),
    Usage("cat of keywords", lambda x, y: torch.cat(dim=-1, tensors=(x, y)), "x:2,6 y:2,4", "x0 y0|x1|y1"),
    Usage("cat along the first axis", lambda x, y: torch.concat([x, y]), "x:2,6 y:3,6", "x0|x1 y1|y0"),
    Usage("cat with nothing", lambda x, y: torch.cat([x[:, :0], y], 1), "x:2,6 y:2,4", "x0 y0|x1|y1"),
    Usage("cat of itself", lambda x: torch.cat([x, x], 1), "x:2,6", "x0|x1"),
    Usage("hstack", lambda x, y: torch.hstack([x, y]), "x:2,6 y:2,4", "x0 y0|x1|y1"),
    Usage("hstack of vectors", lambda x, y: torch.hstack([x, y]), "x:6 y:4", "x0|y0"),
    Usage("vstack", lambda x, y: torch.vstack([x, y]), "x:2,6 y:3,6", "x0|x1 y1|y0"),
    Usage("stack", lambda x, y: torch.stack([x, y], -1), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("interleaved", lambda x, y: torch.stack([x, y], -1).flatten(-2), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("chunk", lambda x: x.chunk(2, -1), "x:2,6", "x0|x1"),
    Usage("chunk of unequal parts", lambda x: x.chunk(3, -1), "x:2,8", "x0|x1"),
    Usage("split into unequal parts", lambda x, n=3: x.split(n, -1), "x:2,8", "x0|x1"),
    Usage("split by a size", lambda x, n=3: x.split(n, 1), "x:2,6,4", "x0|x1|x2"),
    Usage("split by sizes", lambda x, a=2, b=4: torch.split(x, [a, b], dim=1), "x:3,6", "x0|x1|x1"),
    Usage("split by equal sizes", lambda x, a=3, b=3: torch.split(x, [a, b], dim=1), "x:4,6", "x0|x1|x1"),
    Usage("split at places", lambda x, a=2, b=4: torch.tensor_split(x, (a, b), dim=1), "x:3,7", "x0|x1|x1|x1"),
    Usage("a gate and an up projection", lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], "x:2,6", "x0|x1"),
    Usage("parts added", lambda x, y: sum(x.chunk(3, 1)) + y, "x:2,12 y:2,4", "x0 y0|x1 y1"),
    Usage("joined and divided", lambda x, y: torch.cat([x, y], 1).chunk(2, 1), "x:2,4 y:2,4", "x0 y0|x1 y1"),
    Usage(
        "joined and halved elsewhere", lambda x, y: torch.cat([x, y], 1).chunk(2, 1), "x:2,6 y:2,2", "x0 y0|x1|x1 y1"
    ),
    Usage("a sum of joined", lambda x, y, z: torch.cat([x, y], 1) + z, "x:2,6 y:2,4 z:2,10", "x0 y0 z0|x1 z1|y1 z1"),
    Usage(
        "sums of joined in other parts",
        lambda x, y, z, w: torch.cat([x, y], 1) + torch.cat([z, w], 1),
        "x:2,6 y:2,4 z:2,3 w:2,7",
        "x0 y0 z0 w0|x1 z1|x1 w1|y1 w1",
    ),
    Usage("unbind", lambda x: x.unbind(1), "x:2,3,6", "x0|x2"),
    Usage("select", lambda x: x.select(1, 1), "x:2,3,6", "x0|x2"),
    Usage("narrow", lambda x, n=4: x.narrow(1, 0, n), "x:2,6", "x0|x1|x1"),
    Usage("the diagonal", lambda x: torch.diagonal(x, dim1=-2, dim2=-1), "x:2,4,4", "x0|x1 x2"),
    Usage("beside the diagonal", lambda x: torch.diagonal(x, 1), "x:4,4", ""),
    Usage("dense connections", lambda x, w: torch.cat([x, F.linear(x, w)], 1), "x:2,6 w:4,6", "x0|x1 w1|w0"),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()
