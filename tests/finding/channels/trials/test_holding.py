"""Numbers that modules hold are found where they put sizes right, and no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shallower as sh


class Heads(nn.Module):
    """Two numbers of the value of the heads, only one of which the forward gives to its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.heads, self.all = 4, 4, 12
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.all, -1)
        q, k, v = (part.unflatten(-1, (self.heads, 3)).transpose(1, 2) for part in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(y.reshape(len(x), x.shape[1], self.all)) * self.layers


def test_repeated_blocks_get_the_same_numbers_and_no_call_is_written() -> None:
    model = nn.Sequential(nn.Linear(5, 8), Heads(), Heads(), nn.Linear(8, 2)).eval()
    sites = sh.find_sites(model, torch.randn(2, 6, 5), kinds=("hidden", "heads", "stream"))
    found = {site.name: {(f.module, f.attribute, f.each) for f in site.followers} for site in sites}
    assert found["1"] == {("1", "heads", 1), ("1", "all", 3)}
    assert found["2"] == {("2", "heads", 1), ("2", "all", 3)}
    assert not found["0:stream"]
