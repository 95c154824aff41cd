"""Small residual networks whose branches matter in a known order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shallower as sh


class Block(nn.Module):
    """x + F(x) with a norm before it, as in transformers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + y


class Layer(nn.Module):
    """Two branches."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = Block(width, hidden), Block(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class Residual(nn.Module):
    """Layers that matter as much as `sizes` say."""

    def __init__(self, sizes: tuple[float, ...], width: int = 8, hidden: int = 16, *, two: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = Layer if two else Block
        self.layers = nn.ModuleList(made(width, hidden) for _ in sizes)
        with torch.no_grad():
            for layer, size in zip(self.layers, sizes, strict=True):
                for block in layer.modules():
                    if isinstance(block, Block):
                        block.down.weight.mul_(size)
                        block.down.bias.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(count: int = 6, rows: int = 32, width: int = 8) -> list[Tensor]:
    """Batches of random rows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


def sites_of(model: nn.Module, batches: list[Tensor]) -> sh.Sites:
    """Branches, and what can be refitted."""
    return sh.find_sites(model.eval(), batches[0][:2], kinds=("hidden", "branch"))
