"""Branches and layers are found, with what goes when they go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) + self.c(self.b(y).tanh()) + x


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(3, 6, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.skip(x)
        return self.relu(y)


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.tanh() * (x[..., :1].sigmoid() * self.down(F.gelu(self.up(self.norm(x)))))


class Reshaped(Block):
    def forward(self, x: Tensor) -> Tensor:
        halves = self.up(self.norm(x)).view(*x.shape[:-1], 2, x.shape[-1])
        return x + self.down(halves.relu().flatten(-2))


def branches(model: nn.Module, x: Tensor) -> sh.Sites:
    return sh.find_sites(model, x, kinds="branch")


def test_branches_and_layers_of_a_list() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    sites = branches(model, torch.randn(2, 5, 8))
    assert set(sites.names) == {"0:layer", "1:layer", "0:branch", "1:branch"}
    site = sites["1:branch"]
    assert site.layers == ("1.norm", "1.up", "1.down")
    assert (site.kind, site.width, site.branch.closing, site.branch.layer) == ("branch", 1, "1.down", "")
    assert site.params == 16 + 8 * 16 + 16 + 16 * 8 + 8
    assert site.macs == 10 * 2 * 128
    assert sites["1:layer"].params == site.params + 8
    assert sites["1:layer"].branch.layer == "1"


def test_each_of_two_parallel_branches() -> None:
    sites = branches(nn.Sequential(Parallel(), Parallel()), torch.randn(2, 8))
    assert {"0.a:branch", "0:branch", "0:layer"} <= {*sites.names, *sites.skipped}
    assert sites["0.a:branch"].layers == ("0.a",)


def test_a_projected_skip_stays_and_sizes_follow() -> None:
    sites = branches(Convolutions(), torch.randn(1, 3, 8, 8))
    (site,) = sites
    assert site.layers == ("conv1", "bn1", "conv2", "bn2")
    assert (site.branch.channels, site.branch.stride) == (6, 2)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (Reshaped(), ":branch", "`view` in the model needs what the branch computes"),
        (nn.Sequential(*[Block()] * 2), "0:layer", "it is called several times"),
    ],
)
def test_what_cannot_be_dropped_is_skipped_with_the_reason(model: nn.Module, name: str, why: str) -> None:
    sites = branches(model, torch.randn(2, 5, 8))
    assert not sites
    assert why in sites.skipped[name]


def test_any_factor_of_a_product_may_be_zero() -> None:
    sites = branches(Gated(), torch.randn(2, 5, 8))
    assert [site.branch.closing for site in sites] == ["down"]


def test_attention_in_one_call_is_a_branch() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    assert {site.branch.closing for site in branches(model, torch.randn(2, 5, 8))} == {"self_attn", "linear2"}


def test_embeddings_and_plain_lists_are_no_branches() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(10, 8), nn.Embedding(10, 8)
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.layers(self.words(ids) + self.positions(ids.cumsum(1) - 1))

    sites = branches(Text(), torch.ones(1, 4, dtype=torch.long))
    assert not sites
    assert not sites.skipped


def test_what_branches_hold_is_counted_once() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 5, 8)
    layers = sum(p.numel() for p in model[:2].parameters())
    assert branches(model, x).params_held == layers
    both = sh.find_sites(model, x, kinds=("hidden", "branch"))
    assert both.params_held == layers + 8 * 6 + 6 + 6 * 3 + 3
