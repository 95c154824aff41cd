"""Operations on each element by itself."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage

USAGES = [
    Usage("relu", lambda x: F.relu(x), "x:2,6", "x0|x1"),
    Usage("an activation in place", lambda x: F.silu(x.clone(), inplace=True), "x:2,6", "x0|x1"),
    Usage("another type", lambda x: x.to(torch.float32).double().contiguous(), "x:2,6", "x0|x1"),
    Usage("another tensor's type", lambda x, y: x.type_as(y), "x:2,6 y:5", "x0|x1|y0"),
    Usage("dropout", lambda x: F.dropout(x, 0.5, training=False), "x:2,6", "x0|x1"),
    Usage("dropout that stays on", lambda x: F.dropout(x, 0.5), "x:2,6", ""),
    Usage("noise", lambda x: x + torch.randn_like(x), "x:2,6", ""),
    Usage("zeros like it", lambda x: torch.zeros_like(x), "x:2,6", "x0|x1"),
    Usage("a product with a number", lambda x: 2 * x / 3 - 1, "x:2,6", "x0|x1"),
    Usage("a sum", lambda x, y: x + y, "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("a sum with a vector", lambda x, y: y + x, "x:3,2,6 y:6", "x0|x1|x2 y0"),
    Usage("a sum with itself", lambda x: x + x, "x:2,6", "x0|x1"),
    Usage("a sum in place", lambda x, y: x.clone().add_(y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("a scaled sum", lambda x, y: torch.add(x, y, alpha=2), "x:2,6 y:2,1", "x0 y0|x1"),
    Usage("a quotient", lambda x, y: x / (y + 1), "x:2,6 y:6", "x0|x1 y0"),
    Usage("a number minus it", lambda x: torch.rsub(x, 1), "x:2,6", "x0|x1"),
    Usage("each by each", lambda x, y: x[:, None] * y, "x:3 y:4", "x0|y0"),
    Usage("a choice", lambda m, x, y: torch.where(m, x, y), "m:bool:2,6 x:2,6 y:6", "m0 x0|m1 x1 y0"),
    Usage("a choice by comparison", lambda x: torch.where(x > 0.5, x, x.exp()), "x:2,6", "x0|x1"),
    Usage("masked", lambda x, m: x.masked_fill(m, 0.0), "x:3,2,6 m:bool:2,6", "x0|x1 m0|x2 m1"),
    Usage("the larger", lambda x, y: torch.maximum(x, y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("between", lambda x, y: torch.clamp(x, max=y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("a mixture", lambda x, y, w: torch.lerp(x, y, w), "x:2,6 y:2,6 w:6", "x0 y0|x1 y1 w0"),
    Usage("a product added", lambda x, y, z: torch.addcmul(x, y, z), "x:2,6 y:2,6 z:6", "x0 y0|x1 y1 z0"),
    Usage("a copy", lambda x, y: torch.empty_like(x).copy_(y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("comparisons", lambda x, y: (x > y) & ~(x < 0.5), "x:2,6 y:6", "x0|x1 y0"),
    Usage("bins", lambda x, b: torch.bucketize(x, b), "x:2,6 b:4", "x0|x1"),
    Usage("members", lambda x, b: torch.isin(x, b), "x:int4:2,6 b:int4:3", "x0|x1"),
    Usage("slopes of channels", lambda x, w: F.prelu(x - 0.5, w), "x:2,6,3 w:6", "x0|x1 w0|x2"),
    Usage("one slope", lambda x, w: F.prelu(x - 0.5, w), "x:2,6 w:1", "x0|x1"),
    Usage("a gated unit", lambda x: F.glu(x, -1), "x:2,6", "x0|x1"),
    Usage("a gated unit of images", lambda x: F.glu(x, 1), "x:2,6,3", "x0|x1|x2"),
    Usage("complex numbers", lambda x: torch.view_as_complex(x), "x:3,6,2", "x0|x1"),
    Usage("and back", lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j), "x:3,6,2", "x0|x1"),
    Usage("angles", lambda x, y: torch.view_as_real(torch.polar(x, y)), "x:3,6 y:3,6", "x0 y0|x1 y1"),
    Usage("parts of complex numbers", lambda x, y: torch.complex(x, y).imag, "x:3,6 y:6", "x0|x1 y0"),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()


def test_where_of_one_tensor_picks_positions():
    found = Usage("places", lambda x: torch.where(x > 0.5)[0], "x:6", "").check()
    assert found.reasons["x0"].endswith("picks positions by the numbers it reads")
