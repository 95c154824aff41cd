"""Tensors of numbers, of no channels."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage

USAGES = [
    Usage("zeros", lambda x, n=6: x + torch.zeros(n), "x:2,6", "x0|x1"),
    Usage("ones of its kind", lambda x, n=6: torch.cat([x, x.new_ones(x.shape[0], n)], 1), "x:2,6", "x0|x1|out1"),
    Usage("arange", lambda x: x * torch.arange(x.shape[1]), "x:2,6", "x0"),
    Usage("arange of rows", lambda x: x * torch.arange(x.shape[0])[:, None], "x:2,6", "x1"),
    Usage("random numbers", lambda x: x + 0 * torch.randn(x.shape[1]), "x:2,6", "x0"),
    Usage("eye", lambda x: x @ torch.eye(x.shape[1], dtype=x.dtype), "x:2,6", "x0"),
    Usage("one number", lambda x: x * torch.tensor(2.0), "x:2,6", "x0|x1"),
    Usage("one_hot", lambda i: F.one_hot(i, 4), "i:int4:2,3", "i0|i1"),
    Usage("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), "x:3 y:4", "x0|y0"),
    Usage("meshgrid of rows and columns", lambda x, y: torch.meshgrid(x, y, indexing="xy"), "x:3 y:4", "x0|y0"),
    Usage("diagonal matrices", lambda x: torch.diag_embed(x), "x:2,4", "x0|x1"),
    Usage("beside the diagonal", lambda x: torch.diag_embed(x, 1), "x:2,4", ""),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()
