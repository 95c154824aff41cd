"""Random residual networks: every common way of writing x + F(x).

    model, x, others = residual_network(seed)

A block says in `closing` by which of its modules each of its branches ends that must be found.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8
CHANNELS = 6


class DropPath(nn.Module):
    """Stochastic depth, written with a product in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], *[1] * (x.dim() - 1)) > 0.5)


class Feed(nn.Module):
    """What a branch computes of tokens; `returns` says how it gives it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, rng.choice((5, 12)))
        self.outer = nn.Linear(self.inner.out_features, WIDTH, bias=rng.random() < 0.7)
        self.act = rng.choice((nn.ReLU(inplace=True), nn.GELU(), nn.Tanh()))
        self.returns = rng.choice((0, 0, 1, 2))

    def forward(self, hidden: Tensor, mask: Any = None) -> Any:  # noqa: ARG002
        y = self.outer(self.act(self.inner(hidden)))
        return (y, y, (y, None))[self.returns]


class Attention(nn.Module):
    def __init__(self, _: random.Random) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor, mask: Any = None) -> Tensor:  # noqa: ARG002
        q, k, v = (m(hidden).unflatten(-1, (2, -1)).transpose(-3, -2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Some of the ways of writing x + F(x), drawn at random."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(("pre", "pre", "post", "parallel", "both", "gated", "inner", "packed"))
        self.sum = rng.choice(("x + y", "y + x", "y += x", "x += y", "add_", "alpha"))
        self.keyword = rng.random() < 0.4
        self.norm = nn.LayerNorm(WIDTH)
        self.f = rng.choice((Feed, Attention))(rng)
        self.scale: Any = rng.choice((None, None, 0.5, nn.Parameter(torch.rand(WIDTH) + 0.5)))
        self.drop = rng.choice((nn.Identity(), nn.Dropout(0.2), DropPath()))
        self.closing = ["f"]
        if self.way in ("parallel", "both", "inner"):
            self.norm2, self.g = nn.LayerNorm(WIDTH), Feed(rng)
            self.closing = ["f", "g"]
        if self.way == "gated":
            self.gate = rng.choice((nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)))
        if self.way == "packed":
            self.norm2 = nn.LayerNorm(WIDTH)
            self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.closing = ["f", "mha"]

    def part(self, f: nn.Module, x: Tensor) -> Tensor:
        y = f(mask=None, hidden=x) if self.keyword else f(x)
        if isinstance(y, tuple):
            y = y[0]
        if self.scale is not None:
            y = y * self.scale
        return self.drop(y)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        if self.sum == "x + y":
            return x + y
        if self.sum == "y + x":
            return y + x
        if self.sum == "y += x":
            y = y.clone()
            y += x
            return y
        if self.sum == "x += y":
            x += y
            return x
        return torch.add(x, y) if self.sum == "alpha" else y.add_(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "post":
            return self.norm(self.added(x, self.part(self.f, x)))
        if self.way == "parallel":
            y = self.norm(x)
            return x + self.part(self.f, y) + self.part(self.g, self.norm2(x))
        if self.way == "both":
            x = self.added(x, self.part(self.f, self.norm(x)))
            return self.added(x, self.part(self.g, self.norm2(x)))
        if self.way == "gated":
            return self.added(x, torch.sigmoid(self.gate(x)) * self.part(self.f, self.norm(x)))
        if self.way == "inner":
            y = self.norm2(x)
            return self.added(x, self.part(self.f, self.norm(y + self.part(self.g, y))))
        if self.way == "packed":
            y = self.norm2(x)
            x = x + self.mha(y, y, y, need_weights=False)[0]
        return self.added(x, self.part(self.f, self.norm(x)))


class Residual(nn.Module):
    """A block of convolutions with an identity, a projection or a strided projection beside it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        stride, inside = rng.choice((1, 1, 2)), rng.choice((4, CHANNELS))
        self.before = rng.random() < 0.3
        self.conv1 = nn.Conv2d(CHANNELS, inside, 3, stride=stride, padding=1, groups=rng.choice((1, 2)))
        self.bn1 = nn.BatchNorm2d(CHANNELS if self.before else inside)
        self.bn2 = nn.BatchNorm2d(inside if self.before else CHANNELS)
        self.conv2 = nn.Conv2d(inside, CHANNELS, rng.choice((1, 3)), padding="same", bias=rng.random() < 0.5)
        self.relu, self.last = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.squeeze = nn.Conv2d(CHANNELS, CHANNELS, 1) if rng.random() < 0.3 else None
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or rng.random() < 0.3:
            self.skip = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, stride=stride), nn.BatchNorm2d(CHANNELS))
        self.closing = ["conv2" if self.before else "bn2"]

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            y = self.conv2(self.bn2(self.conv1(F.relu(self.bn1(x)))).relu())
        else:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.squeeze is not None:
            y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        y += self.skip(x)
        return y if self.before else self.last(y)


class Chain(nn.Module):
    """Blocks in a list, one after the other; some of them may be lists themselves, or one block may stand twice."""

    def __init__(self, blocks: list[nn.Module], style: str) -> None:
        super().__init__()
        self.style = style
        if style == "dict":
            self.blocks: Any = nn.ModuleDict({f"block_{i}": block for i, block in enumerate(blocks)})
        else:
            self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "numbers":
            for i in range(len(self.blocks)):
                x = self.blocks[i](x)
            return x
        for block in self.blocks.values() if self.style == "dict" else self.blocks:
            x = block(x)
        return x


def residual_network(seed: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A network, its example input, and inputs of other shapes."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    images = rng.random() < 0.35
    kind: Callable[[random.Random], nn.Module] = Residual if images else Block
    blocks = [kind(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.15:
        blocks.append(blocks[0])
    if rng.random() < 0.2:
        blocks.insert(rng.randint(0, len(blocks)), Chain([kind(rng) for _ in range(2)], "list"))
    style = rng.choice(("list", "numbers", "dict", "sequential"))
    body: nn.Module = nn.Sequential(*blocks) if style == "sequential" else Chain(blocks, style)
    if images:
        model = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, padding=1), body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
        )
        x, others = torch.randn(2, 3, 8, 8), [torch.randn(1, 3, 9, 13), torch.randn(3, 3, 16, 8)]
    else:
        model = nn.Sequential(nn.Linear(4, WIDTH), body, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
        x, others = torch.randn(2, 5, 4), [torch.randn(3, 5, 4), torch.randn(1, 7, 4)]
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval(), x, others


def must_be_found(model: nn.Module) -> set[str]:
    """The closing modules of the branches that nothing hinders, by their full names."""
    held: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        held.setdefault(module, []).append(name)
    found: set[str] = set()
    for module, names in held.items():
        if isinstance(module, (Block, Residual)) and len(names) == 1:
            found |= {f"{names[0]}.{part}" for part in module.closing}
    return found
