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


class Checking(nn.Module):
    """Says that its input has to have as many channels as it was made for."""

    def __init__(self, num_channels: int, width: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.projection = nn.Conv2d(num_channels, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_channels:
            raise ValueError("these are not the channels of the configuration")
        return self.projection(x)


def test_a_number_that_a_forward_only_checks_falls_with_the_channels_that_it_checks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Checking(8, 6), Checking(6, 4), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    sites = sh.find_sites(model, x)
    assert [site.width for site in sites] == [8, 6]
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(0, site.width, 2)) for site in sites))
    small = sh.apply(model, plan, x)
    assert (small[1].num_channels, small[2].num_channels) == (4, 3)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


class Crossing(nn.Module):
    """Reads a second stream, and looks at the width of the first before it does."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.width = width
        self.own, self.read = nn.Linear(width, width), nn.Linear(other, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] != self.width:
            raise ValueError("this is not the width of the configuration")
        return x + torch.relu(self.read(y)) * self.own(x)


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 12)
        self.blocks, self.last = nn.ModuleList(Crossing(8, 12) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.second(x), self.first(x)
        for block in self.blocks:
            x = block(x, y)
        return self.last(x)


def test_each_block_may_check_the_channels_that_it_is_given_before_it_reads_others() -> None:
    model, x = Crossed().eval(), torch.randn(5, 4)
    sites = sh.find_sites(model, x, kinds="all")
    stream = next(site for site in sites if site.kind == "stream")
    assert {(each.module, each.attribute) for each in stream.followers} == {(f"blocks.{i}", "width") for i in range(3)}
    plan = sh.Plan((sh.Entry.narrow(stream, [0, 2, 3, 6, 7]),))
    small = sh.apply(model, plan, x)
    assert [block.width for block in small.blocks] == [5, 5, 5]
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))
