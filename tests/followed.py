"""Small networks whose channels have to be followed: squeeze and excitation, stages, concatenation, groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Excited(nn.Module):
    """An inverted residual with squeeze and excitation: its pixels and their average are both read."""

    def __init__(self, channels: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reduce, self.excite = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.depthwise(F.silu(self.norm(self.expand(x)))))
        scale = self.excite(F.relu(self.reduce(h.mean((2, 3), keepdim=True))))
        return x + self.project(h * scale.sigmoid())


class Stages(nn.Module):
    """Two stages of residual blocks: two streams, the second begun by a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = Excited(6, 10)
        self.second = Excited(6, 8)
        self.down, self.skip = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1, stride=2)
        self.third = Excited(8, 12)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(F.relu(self.stem(x))))
        x = self.third(F.relu(self.down(x)) + self.skip(x))
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Two maps side by side, read together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(10, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(torch.cat((self.a(x), self.b(x)), 1)))


class Grouped(nn.Module):
    """A grouped convolution: whole groups go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Attending(nn.Module):
    """Attention by hand, with the number of heads in the forward and key heads that queries share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_groups, self.size = 4, 2, 3
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.num_groups, self.size).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).view(b, t, self.num_groups, self.size).transpose(1, 2).repeat_interleave(2, dim=1)
        probabilities = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
        return x + self.out((probabilities @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.size))


class WrittenOut(nn.Module):
    """A forward that says how many channels there are, as a number of its own, in a function without source text."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(eval("y.view(-1, 2, 4).flip(0).reshape(-1, 8)", {"y": F.relu(self.a(x)).mean((2, 3))}))


class Scaled(nn.Module):
    """A forward that takes another way where it is narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.shape[-1] < 8:
            h = h * 2
        return self.b(h)


class Encoding(nn.Module):
    """PyTorch's own encoder, and its attention to what has other widths, with keys of its own, by steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.key, self.value = nn.Linear(5, 12), nn.Linear(5, 6), nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(12, 4, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(12, 3, kdim=6, vdim=8, add_bias_kv=True, add_zero_attn=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(self.stem(x)).transpose(0, 1)
        y, _ = self.cross(h, self.key(x).transpose(0, 1), self.value(x).transpose(0, 1))
        return self.head(h + y)


class Normed(nn.Module):
    """Weight norms: one length for each row, for each tap, for the whole weight; as a parametrization and as a hook."""

    def __init__(self) -> None:
        super().__init__()
        norm, hooked = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
        self.a, self.b = norm(nn.Conv1d(3, 8, 3, padding=1)), norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)
        self.c, self.d = norm(nn.Conv1d(8, 6, 1), dim=None), hooked(nn.Linear(6, 10))
        self.head = hooked(nn.Linear(10, 4), dim=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.c(x + self.b(x.sigmoid())).sigmoid()
        return self.head(self.d(x.mean(2)).sigmoid())


class WithScale(nn.Module):
    """A layer that passes a scale on beside what it gives, as quantised networks do."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(d_out, d_in)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return F.linear(x, self.weight, self.bias), scale


class NormWithScale(nn.Module):
    """A norm that passes a scale on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = x - x.mean(-1, keepdim=True)
        return y / (1e-5 + (y**2).mean(-1, keepdim=True)).sqrt() * self.weight, scale


class Scales(nn.Module):
    """Layers that give a tensor and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = WithScale(5, 8), NormWithScale(8)
        self.up, self.down, self.head = WithScale(8, 12), WithScale(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.stem(x)
        y, scale = self.up(self.norm(x, scale)[0].relu(), scale)
        return self.head(x + self.down(y.relu(), scale)[0])


class Recurrent(nn.Module):
    """Recurrent layers of all kinds: both ways, one upon the other, with a projected state, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(5, 6), nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 6, batch_first=True, bias=False)
        self.projected, self.cell = nn.LSTM(6, 8, proj_size=4, batch_first=True), nn.LSTMCell(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.projected(self.gru(self.lstm(self.stem(x).tanh())[0])[0])
        return self.head(self.cell(x.mean(1))[0])


def drawn(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in eval mode with all its numbers drawn at random, those of norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return model.to(dtype).eval()
