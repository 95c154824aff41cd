"""Networks whose forwards write sizes out themselves, one for each idiom: found, cut, proven, saved, loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import shallower as sh


class Attention(nn.Module):
    """C stands for the stream's width and for heads times features."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class InConfig(nn.Module):
    """Heads and features are held in a config; a result is sliced at numbers that are computed from them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=3, d_head=4)
        self.qkv, self.out = nn.Linear(width, 36), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        all_of = self.config.n_head * self.config.d_head
        qkv = self.qkv(x)
        q = qkv[..., :all_of].view(b, s, self.config.n_head, self.config.d_head).transpose(1, 2)
        k = qkv[..., all_of : 2 * all_of].view(b, s, self.config.n_head, self.config.d_head).transpose(1, 2)
        v = qkv[..., -all_of:].view(b, s, self.config.n_head, self.config.d_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).contiguous().view(b, s, all_of))


class Splits(nn.Module):
    """Parts whose sizes are computed, and a scalar gate beside them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.into, self.out, self.other = nn.Linear(width, 17), nn.Linear(8, width), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        n = (self.into.bias.shape[0] - 1) // 2 if self.training else 8
        a, b, gate = torch.split(self.into(x), [n, n, 1], dim=-1)
        return x + self.out(a.relu()) + self.other(b.tanh() * gate)


def window_partition(x: Tensor, size: int) -> Tensor:
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, C)


def window_reverse(windows: Tensor, size: int, H: int, W: int, C: int) -> Tensor:
    return windows.view(-1, H // size, W // size, size, size, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, C)


class Windows(nn.Module):
    """The sizes are written in functions that the forward calls."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        y = x.view(B, 2, N // 2, C)
        windows = self.one(window_partition(y, 2))
        return x + self.two(window_reverse(windows, 2, 2, N // 2, 10)).view(B, N, C)


class Recurrence(nn.Module):
    """States of zeros, and a token that is expanded, of widths that are written out; a method computes a part."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.step, self.read, self.out = nn.Linear(width, 6), nn.Linear(6, 6), nn.Linear(6, width)

    def rest(self, x: Tensor) -> Tensor:
        return x[:, :, 4:]

    def forward(self, x: Tensor) -> Tensor:
        h, size = torch.zeros(x.shape[0], 6, dtype=x.dtype), 6
        found = []
        for one in x.unbind(1):
            h = torch.tanh(self.step(one) + self.read(h))
            found.append(h + one.new_ones(1, 1)[0].expand(1, size) * 0.5)
        y = torch.stack(found, 1)
        z = torch.zeros(*y.shape[:2], size, dtype=x.dtype)
        z[:, :, :4] = y[:, :, :4]
        z[:, :, 4:] = self.rest(y)
        return x + self.out(z)


class Net(nn.Module):
    """A stem, two blocks and a head: channels of the stream, and those within blocks."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(5, 12), nn.Sequential(block(), block()), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y


KINDS = ("hidden", "heads", "stream")
IDIOMS: list[Callable[[], nn.Module]] = [Attention, InConfig, Splits, Windows, Recurrence]


def made(block: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(block).eval().double(), torch.randn(2, 8, 5, dtype=torch.float64)


def entries(sites: sh.Sites, seed: int = 0) -> list[sh.Entry]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for site in sites:
        kept = torch.randperm(site.width, generator=generator)[: (site.width + 1) // 2].sort().values
        found.append(sh.Entry.narrow(site, kept))
    return found


def written(sites: sh.Sites) -> list[Any]:
    return [follower for site in sites for follower in site.followers if follower.written is not None]


@pytest.mark.parametrize("block", IDIOMS)
def test_all_its_channels_are_found_and_cut_together(block: Callable[[], nn.Module]) -> None:
    model, x = made(block)
    sites = sh.find_sites(model, x, kinds=KINDS)
    assert set(sites.skipped) <= {"head"}, "the model returns what its rows give"
    assert written(sites)
    plan = sh.Plan(tuple(entries(sites)))
    small = sh.apply(model, plan, x)
    longer = torch.randn(5, 12, 5, dtype=torch.float64)
    assert_close(small(longer), sh.simulate(model, plan)(longer), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", IDIOMS)
def test_each_of_its_sites_is_cut_alone(block: Callable[[], nn.Module]) -> None:
    model, x = made(block)
    for entry in entries(sh.find_sites(model, x, kinds=KINDS), seed=1):
        plan = sh.Plan((entry,))
        other = torch.randn(3, 12, 5, dtype=torch.float64)
        assert_close(sh.apply(model, plan, x)(other), sh.simulate(model, plan)(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", IDIOMS)
def test_what_was_cut_twice_is_loaded_into_a_fresh_model(block: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, x = made(block)
    small = sh.apply(model, sh.Plan(tuple(entries(sh.find_sites(model, x, kinds=KINDS)))), x)
    again = sh.find_sites(small, x, kinds=KINDS)
    plan = sh.Plan(tuple(entries(again, seed=2)))
    plan.save(tmp_path / "plan")
    smallest = sh.apply(small, sh.Plan.load(tmp_path / "plan"), x)
    assert sum(p.numel() for p in smallest.parameters()) < sum(p.numel() for p in small.parameters())
    sh.save(smallest, tmp_path / "out")
    loaded = sh.load(tmp_path / "out", model=made(block)[0]).eval()
    assert torch.equal(loaded(x), smallest(x))


def test_a_stream_that_disturbs_no_number_leaves_the_forwards_of_blocks_alone() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).view(*x.shape[:2], 8).relu())

    model, x = made(Fixed)
    for site in sh.find_sites(model, x, kinds=KINDS):
        assert bool(site.followers) == (site.kind != "stream")


def test_a_forward_that_was_replaced_on_the_instance_is_the_reason() -> None:
    model, x = made(Splits)
    block: Any = model.get_submodule("blocks.0")
    block.forward = block.forward
    sites = sh.find_sites(model, x, kinds=KINDS)
    assert any("has been replaced on the instance" in reason for reason in sites.skipped.values())


def test_the_result_is_exported_and_compiled() -> None:
    model, x = made(Attention)
    small = sh.apply(model, sh.Plan(tuple(entries(sh.find_sites(model, x, kinds=KINDS)))), x)
    assert_close(torch.export.export(small, (x,)).module()(x), small(x))
    assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))
