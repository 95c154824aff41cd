"""Networks as people write them, each with something of its own between its linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.families import Family


def _pictures(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def _vectors(length: int = 6, features: int = 5) -> Tensor:
    return torch.randn(2, length, features)


def _tokens(length: int = 8, words: int = 50) -> Tensor:
    return torch.randint(0, words, (2, length))


def _conv(d_in: int, d_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(d_out), nn.SiLU())


class UNet(nn.Module):
    """Two levels, transposed convolutions, skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = _conv(3, 8), _conv(8, 12), _conv(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.back2, self.back1, self.out = _conv(24, 12), _conv(16, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        two = self.back2(torch.cat((self.up2(three), two), 1))
        y: Tensor = self.out(self.back1(torch.cat((self.up1(two), one), 1)))
        return y


class C2f(nn.Module):
    """YOLOv8: split in two, bottlenecks on one part, every step concatenated."""

    def __init__(self, width: int = 16, half: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.cv1, self.cv2 = _conv(width, 2 * half, 1), _conv((2 + blocks) * half, width, 1)
        self.m = nn.ModuleList([nn.Sequential(_conv(half, half), _conv(half, half)) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]))
        made: Tensor = self.cv2(torch.cat(y, 1))
        return made


class Ghost(nn.Module):
    """GhostNet: half of the channels are made from the other half by cheap convolutions."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_out, half = d_out, d_out // 2
        self.primary, self.cheap = _conv(d_in, half, 1), _conv(half, half, 3, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        one = self.primary(x)
        return torch.cat((one, self.cheap(one)), 1)[:, : self.d_out]


class Inception(nn.Module):
    """Four branches, concatenated."""

    def __init__(self, d_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.a, self.b = _conv(d_in, a, 1), nn.Sequential(_conv(d_in, 6, 1), _conv(6, b))
        self.c = nn.Sequential(_conv(d_in, 4, 1), _conv(4, c, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(d_in, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in (self.a, self.b, self.c, self.d)], 1)


class Dense(nn.Module):
    """DenseNet: BatchNorms of everything that was made so far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 4 * i) for i in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3)])
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        y: Tensor = self.head(self.norms[3](torch.cat(features, 1)).relu().mean((2, 3)))
        return y


class Shuffle(nn.Module):
    """ShuffleNet V2: half of the channels pass, the others are convolved, then they are interleaved."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(_conv(half, half, 1), _conv(half, half, 3, groups=half), _conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat((left, self.branch(right)), 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class PointNet(nn.Module):
    """Maps shared by all points, the largest over points, and that again beside each point."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 16, 1)
        self.n1, self.n2 = nn.BatchNorm1d(12), nn.BatchNorm1d(16)
        self.mix, self.out = nn.Conv1d(28, 20, 1), nn.Conv1d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = self.n1(self.one(x)).relu()
        far = self.n2(self.two(local)).max(2, keepdim=True)[0].expand(-1, -1, x.shape[2])
        y: Tensor = self.out(self.mix(torch.cat((local, far), 1)).relu())
        return y


class TCN(nn.Module):
    """Causal dilated convolutions with weight norm, cut at the end."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.convs = nn.ModuleList(
            [norm(nn.Conv1d(4 if i == 0 else 12, 12, 3, padding=2**i * 2, dilation=2**i)) for i in range(3)]
        )
        self.down, self.head = nn.Conv1d(4, 12, 1), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, conv in enumerate(self.convs):
            made = conv(y)[..., : -(2**i * 2)].relu()
            y = made + (self.down(y) if i == 0 else y)
        out: Tensor = self.head(y[..., -1])
        return out


class WaveNet(nn.Module):
    """Gated dilated convolutions, a residual path and a path of skips."""

    def __init__(self, width: int = 12, skip: int = 10) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, width, 1)
        self.f = nn.ModuleList([nn.Conv1d(width, width, 2, dilation=2**i) for i in range(3)])
        self.g = nn.ModuleList([nn.Conv1d(width, width, 2, dilation=2**i) for i in range(3)])
        self.residual = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(3)])
        self.skip = nn.ModuleList([nn.Conv1d(width, skip, 1) for _ in range(3)])
        self.end, self.out = nn.Conv1d(skip, 14, 1), nn.Conv1d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), torch.zeros(())
        for f, g, residual, skip in zip(self.f, self.g, self.residual, self.skip, strict=True):
            z = torch.tanh(f(x)) * torch.sigmoid(g(x))
            x = residual(z) + x[..., -z.shape[-1] :]
            made = skip(z)
            total = made + (total[..., -made.shape[-1] :] if total.dim() else total)
        y: Tensor = self.out(F.relu(self.end(F.relu(total))))
        return y


class LoRALinear(nn.Module):
    """A linear layer beside two of low rank, added or merged into the weight."""

    def __init__(self, d_in: int, d_out: int, rank: int = 4, merged: bool = False) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(d_in, d_out), merged
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(rank, d_in)), nn.Parameter(torch.randn(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + 0.5 * self.lora_b @ self.lora_a, self.base.bias)
        made: Tensor = self.base(x) + 0.5 * (x @ self.lora_a.T) @ self.lora_b.T
        return made


class StandardConv(nn.Conv2d):
    """Weight standardisation: every filter has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FrozenNorm(nn.Module):
    """BatchNorm of buffers, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.3), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.9)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + 1e-5).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class RepVGG(nn.Module):
    """Before re-parameterisation: 3x3, 1x1 and the identity, each with its BatchNorm, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.big = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.small = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.same = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.big(x) + self.small(x) + self.same(x))


class Attention(nn.Module):
    """Attention with one packed projection, its parts in any order and layout, and biases of several kinds."""

    def __init__(
        self, width: int = 16, heads: int = 4, order: str = "qkv", packed: str = "parts", bias: str = ""
    ) -> None:
        super().__init__()
        self.heads, self.order, self.packed, self.bias = heads, order, packed, bias
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if bias == "alibi":
            self.register_buffer("slopes", torch.tensor([2.0 ** -(i + 1) for i in range(heads)]))
        if bias == "table":
            self.table = nn.Embedding(32, heads)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        made = self.qkv(x)
        if self.packed == "heads":  # GPT-NeoX: each head's q, k and v side by side
            parts = made.view(b, t, self.heads, -1).transpose(1, 2).chunk(3, -1)
        elif self.packed == "view":
            parts = made.view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = [part.view(b, t, self.heads, -1).transpose(1, 2) for part in made.chunk(3, -1)]
        q, k, v = (parts[self.order.index(name)] for name in "qkv")
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        distance = (torch.arange(t)[None] - torch.arange(t)[:, None]).abs()
        if self.bias == "alibi":
            scores = scores - self.get_buffer("slopes")[:, None, None] * distance
        if self.bias == "table":
            scores = scores + self.table(distance.clamp(max=31)).permute(2, 0, 1)
        z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        y: Tensor = self.out(z)
        return y


class LatentAttention(nn.Module):
    """MLA: queries, keys and values from compressed latents, positions in a part that all heads share."""

    def __init__(
        self, width: int = 16, heads: int = 4, rank: int = 8, nope: int = 6, rope: int = 4, value: int = 5
    ) -> None:
        super().__init__()
        self.heads, self.nope, self.rope, self.value, self.rank = heads, nope, rope, value, rank
        self.q_a, self.q_b = nn.Linear(width, rank), nn.Linear(rank, heads * (nope + rope))
        self.kv_a, self.kv_b = nn.Linear(width, rank + rope), nn.Linear(rank, heads * (nope + value))
        self.norm, self.out = nn.RMSNorm(rank), nn.Linear(heads * value, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_b(self.q_a(x)).view(b, t, self.heads, -1).transpose(1, 2)
        latent, position = self.kv_a(x).split([self.rank, self.rope], -1)
        kv = self.kv_b(self.norm(latent)).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = kv.split([self.nope, self.value], -1)
        k = torch.cat((k, position[:, None].expand(-1, self.heads, -1, -1)), -1)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        y: Tensor = self.out(z)
        return y


class GPT(nn.Module):
    """nanoGPT: LayerNorm, packed attention with a causal mask, a tied head."""

    def __init__(self, width: int = 16, words: int = 50) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(32, width)
        self.n1, self.n2, self.n3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.wte.weight
        self.n_embd, self.n_head = width, 4

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t))
        q, k, v = self.c_attn(self.n1(x)).split(self.n_embd, dim=2)
        q, k, v = (part.view(b, t, self.n_head, self.n_embd // self.n_head).transpose(1, 2) for part in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(z.transpose(1, 2).contiguous().view(b, t, self.n_embd))
        x = x + self.proj(F.gelu(self.fc(self.n2(x))))
        y: Tensor = self.head(self.n3(x))
        return y


class ExpertList(nn.Module):
    """A mixture of a list of experts, each on the tokens that were sent to it."""

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, which = torch.where(chosen == i)
            y.index_add_(0, rows, expert(flat[rows]) * weights[rows, which, None])
        return y.view_as(x)


class ExpertTensors(nn.Module):
    """A mixture whose experts are slices of 3-d parameters, all of them run on every token."""

    def __init__(self, width: int = 16, experts: int = 4, hidden: int = 24) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gate, up = torch.matmul(flat, self.up).chunk(2, -1)
        made = torch.bmm(F.silu(gate) * up, self.down)
        weights = self.router(flat).softmax(-1)
        return torch.einsum("ne,end->nd", weights, made).view_as(x)


class DLRM(nn.Module):
    """Embeddings and dense features, all products of two of them, and a network on top."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(20, width) for _ in range(3)])
        self.bottom = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 14), nn.ReLU(), nn.Linear(14, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *[table(sparse[:, i]) for i, table in enumerate(self.tables)]], 1)
        products = rows @ rows.transpose(1, 2)
        i, j = torch.tril_indices(4, 4, -1)
        y: Tensor = self.top(torch.cat((x, products[:, i, j]), 1))
        return y


class NeRF(nn.Module):
    """Positions as sines, a skip of the input in the middle, density and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(18, 16), nn.Linear(16, 16), nn.Linear(34, 16)
        self.density, self.colour = nn.Linear(16, 1), nn.Sequential(nn.Linear(19, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        scaled = torch.cat([points * 2.0**i for i in range(3)], -1)
        x = torch.cat((scaled.sin(), scaled.cos()), -1)
        h = F.relu(self.two(F.relu(self.one(x))))
        h = F.relu(self.three(torch.cat((h, x), -1)))
        return self.density(h), self.colour(torch.cat((h, views), -1)).sigmoid()


class Recurrent(nn.Module):
    """An LSTM beside a feed-forward network on the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(5, 12), nn.LSTM(12, 10, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9))
        self.head = nn.Linear(19, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(torch.cat((self.lstm(x)[0], self.mlp(x)), -1))
        return y


class Excited(nn.Module):
    """Squeeze and excitation, channel attention over a residual."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.a, self.b = _conv(width, width), _conv(width, width)
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        scale = self.up(self.down(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        made: Tensor = x + scale * y
        return made


class Conditioned(nn.Module):
    """A diffusion block: GroupNorm, a shift and a scale from the time's embedding, a skip."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.inp(x)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        y = self.conv1(F.silu(self.norm1(h)))
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        made: Tensor = self.out(h + y)
        return made


class Mixed(nn.Module):
    """MLP-Mixer written with einsum: one network over positions, one over features."""

    def __init__(self, positions: int = 6, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, positions)), nn.Parameter(torch.randn(positions, 10))
        self.c, self.d = nn.Parameter(torch.randn(24, width)), nn.Parameter(torch.randn(width, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("pq,bqd->bpd", self.b, F.gelu(torch.einsum("qp,bpd->bqd", self.a, x)))
        return x + torch.einsum("df,bpf->bpd", self.d, F.gelu(torch.einsum("fd,bpd->bpf", self.c, x)))


def _residual(*parts: nn.Module) -> nn.Module:
    class Residuals(nn.Module):
        """x + part(x), part after part, between two linear layers."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.parts, self.head = nn.Linear(5, 16), nn.ModuleList(parts), nn.Linear(16, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for part in self.parts:
                x = x + part(x)
            y: Tensor = self.head(x)
            return y

    return Residuals()


def _images(*parts: nn.Module, start: int = 16, end: int = 16) -> nn.Module:
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(end, 7))
    return nn.Sequential(nn.Conv2d(3, start, 3, padding=1), *parts, *tail)


def _standardised() -> nn.Module:
    convs = [StandardConv(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), StandardConv(16, 16, 3, padding=1)]
    return _images(*convs, nn.BatchNorm2d(16), nn.ReLU())


def _frozen() -> nn.Module:
    conv = nn.Conv2d(16, 12, 3, padding=1, bias=False)
    return _images(FrozenNorm(16), nn.ReLU(), conv, FrozenNorm(12), nn.ReLU(), end=12)


def _lora(merged: bool) -> nn.Module:
    return nn.Sequential(
        LoRALinear(5, 16, merged=merged), nn.GELU(), LoRALinear(16, 12, merged=merged), nn.GELU(), nn.Linear(12, 7)
    )


MADE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor | tuple[Tensor, ...]]]] = {
    "unet": (UNet, _pictures),
    "c2f": (lambda: _images(C2f()), _pictures),
    "ghostnet": (lambda: _images(Ghost(16, 16), Ghost(16, 12), end=12), _pictures),
    "inception": (lambda: _images(Inception(16, (4, 8, 6, 4)), Inception(22, (4, 6, 4, 6)), end=20), _pictures),
    "densenet": (Dense, _pictures),
    "shufflenet": (lambda: _images(Shuffle(), Shuffle()), _pictures),
    "pointnet": (PointNet, lambda: torch.randn(2, 3, 20)),
    "tcn": (TCN, lambda: torch.randn(2, 4, 20)),
    "wavenet": (WaveNet, lambda: torch.randn(2, 4, 20)),
    "lora_added": (lambda: _lora(False), _vectors),
    "lora_merged": (lambda: _lora(True), _vectors),
    "weight_standardisation": (_standardised, _pictures),
    "frozen_batchnorm": (_frozen, _pictures),
    "repvgg": (lambda: _images(RepVGG(16), RepVGG(16)), _pictures),
    "qkv_packed": (lambda: _residual(Attention()), _vectors),
    "kvq_packed": (lambda: _residual(Attention(order="kvq", packed="view")), _vectors),
    "vkq_by_heads": (lambda: _residual(Attention(order="vkq", packed="heads")), _vectors),
    "alibi": (lambda: _residual(Attention(bias="alibi")), _vectors),
    "t5_bias": (lambda: _residual(Attention(bias="table")), _vectors),
    "latent_attention": (lambda: _residual(LatentAttention()), _vectors),
    "nanogpt": (GPT, _tokens),
    "moe_list": (lambda: _residual(ExpertList()), lambda: _vectors(20)),
    "moe_tensors": (lambda: _residual(ExpertTensors()), _vectors),
    "dlrm": (DLRM, lambda: (torch.randn(4, 5), torch.randint(0, 20, (4, 3)))),
    "nerf": (NeRF, lambda: (torch.randn(6, 3), torch.randn(6, 3))),
    "lstm_beside_mlp": (Recurrent, _vectors),
    "squeeze_excitation": (lambda: _images(Excited(), start=12, end=12), _pictures),
    "diffusion_block": (Conditioned, lambda: (_pictures(), torch.randn(2, 6))),
    "mixer_einsum": (lambda: _residual(Mixed()), _vectors),
}


def listed() -> list[Family]:
    """All of them."""

    def made(name: str) -> Callable[[], tuple[nn.Module, Tensor | tuple[Tensor, ...]]]:
        make, example = MADE[name]
        return lambda: (make(), example())

    return [Family(f"hand_{name}", "by hand", made(name)) for name in MADE]
