"""Random networks, and random plans for their sites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.geometry import composed, fitted_map
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply

MODULES = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.PReLU)
FUNCTIONS = (F.relu, F.gelu, F.silu, torch.tanh, F.softplus)
seeds = st.integers(0, 2**31 - 1)


class Call(nn.Module):
    """A function as one of a module's own calls."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


class Block(nn.Module):
    """producer - [norm] - f - [dropout] - [norm] - consumer, with or without a residual around it."""

    def __init__(self, producer: nn.Module, f: Any, consumer: nn.Module, before: nn.Module, after: nn.Module,
                 residual: bool) -> None:  # fmt: skip
        super().__init__()
        self.up, self.down = producer, consumer
        self.before, self.after = before, after
        self.function = None if isinstance(f, nn.Module) else f
        if isinstance(f, nn.Module):
            self.f = f
        self.dropout = nn.Dropout(0.2)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(self.up(x))
        z = self.f(h) if self.function is None else self.function(h)
        y = self.down(self.after(self.dropout(z)))
        return x + y if self.residual else y


class Gated(nn.Module):
    """SwiGLU and its relatives, with two producers."""

    def __init__(self, d: int, n: int, f: Any, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, n, bias), nn.Linear(d, n, bias), nn.Linear(n, d, bias)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.f(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """The same with gate and up projection in one tensor."""

    def __init__(self, d: int, n: int, f: Any, bias: bool, gate_first: bool) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(d, 2 * n, bias), nn.Linear(n, d, bias)
        self.f, self.gate_first = f, gate_first

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        gate, up = (a, b) if self.gate_first else (b, a)
        return x + self.down(up * self.f(gate))


class Shared(nn.Module):
    """A hidden tensor that several linear maps read."""

    def __init__(self, d: int, n: int, f: Any, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d, n)
        self.left, self.right = nn.Linear(n, d, bias), nn.Linear(n, d)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        z = self.f(self.up(x))
        return x + self.left(z) * torch.sigmoid(self.right(z))


class Chain(nn.Module):
    """Linear layers with nothing but activations between: every inner layer is a consumer and a producer.

    The one activation module is called at every place.
    """

    def __init__(self, widths: list[int], f: nn.Module, biases: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(i, o, bias) for i, o, bias in zip(widths, widths[1:], biases, strict=False)
        )
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.f(layer(x))
        return self.layers[-1](x)


class AfterSum(nn.Module):
    """An activation behind a sum: a place without a hidden width of its own."""

    def __init__(self, width: int = 8, outputs: int = 2) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(x + self.one(x)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Three convolutions with BatchNorm and ReLU between, the middle one padded: two overlapping sites."""

    def __init__(self, d: int, n: int, m: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(d, n, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU(inplace=True),
            nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(inplace=True), nn.Conv2d(m, d, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Inverted(nn.Module):
    """MobileNetV2's block: a 1x1 convolution that widens, a depthwise one, a 1x1 one back, and a residual around."""

    def __init__(self, d: int, n: int, k: int, stride: int, padding: int, f: nn.Module, residual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(d, n, 1, bias=False), nn.BatchNorm2d(n), f,
            nn.Conv2d(n, n, k, stride=stride, padding=padding, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6(),
            nn.Conv2d(n, d, 1, bias=False), nn.BatchNorm2d(d),
        )  # fmt: skip
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def params(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    """The model after surgery that left the first half of every site's channels."""
    sites = find_sites(model, x)
    return apply(model, Plan(tuple(Entry.narrow(site, torch.arange(site.width // 2)) for site in sites)), x)


def _randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """BatchNorms with statistics of their own, and all weights of moderate size."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=0.4)
            nn.init.normal_(module.bias, std=0.4)
    return model.to(dtype).eval()


@st.composite
def networks(draw: st.DrawFn, dtypes: Iterable[torch.dtype] = (torch.float64,)) -> tuple[nn.Module, Tensor]:
    """Chains and residual blocks of linear layers, and an input.

    Args:
        dtypes: of weights and input.
    """
    torch.manual_seed(draw(seeds))
    d = draw(st.integers(2, 6))
    rows = draw(st.booleans())  # BatchNorm1d takes rows of features
    blocks: list[nn.Module] = []
    for kind in draw(
        st.lists(st.sampled_from(["block", "gated", "packed", "shared", "chain"]), min_size=1, max_size=3)
    ):
        n = draw(st.integers(2, 14))
        bias = draw(st.booleans())
        function = draw(st.sampled_from(FUNCTIONS))
        module = draw(st.sampled_from(MODULES))
        f: Any = module(n) if module is nn.PReLU and rows and draw(st.booleans()) else module()
        f = f if draw(st.booleans()) else function
        if kind == "block":
            linear = Conv1D if draw(st.booleans()) else None
            up = nn.Linear(d, n, bias) if linear is None else Conv1D(n, d)
            down = nn.Linear(n, d, draw(st.booleans())) if linear is None else Conv1D(d, n)
            before = nn.BatchNorm1d(n) if rows and draw(st.booleans()) else nn.Identity()
            after = nn.BatchNorm1d(n, affine=draw(st.booleans())) if rows and draw(st.booleans()) else nn.Identity()
            blocks.append(Block(up, f, down, before, after, draw(st.booleans())))
        elif kind == "gated":
            blocks.append(Gated(d, n, f, bias))
        elif kind == "packed":
            blocks.append(Packed(d, n, f, bias, draw(st.booleans())))
        elif kind == "shared":
            blocks.append(Shared(d, n, f, bias))
        else:
            widths = [d, n, draw(st.integers(2, 14)), draw(st.integers(2, 8)), d]
            biases = draw(st.lists(st.booleans(), min_size=4, max_size=4))
            blocks.append(Chain(widths, draw(st.sampled_from(MODULES))(), biases))
    dtype = draw(st.sampled_from(list(dtypes)))
    x = torch.randn(3, d) if rows else torch.randn(2, 3, d)
    return _randomised(nn.Sequential(*blocks), dtype), x.to(dtype)


@st.composite
def convolutional_networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Chains and residual blocks of convolutions, float64, and an image."""
    torch.manual_seed(draw(seeds))
    d = draw(st.integers(2, 4))
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        n = draw(st.integers(2, 8))
        other = draw(st.integers(0, 5))
        if other == 0:
            blocks.append(Bottleneck(d, n, draw(st.integers(2, 8))))
            continue
        if other == 1:
            f = draw(st.sampled_from([nn.ReLU6(inplace=True), nn.SiLU(), nn.PReLU(n)]))
            blocks.append(Inverted(d, n, 3, 1, 1, f, draw(st.booleans())))
            continue
        k1, k2 = draw(st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3), (2, 2)]))
        stride = draw(st.sampled_from([1, 2]))
        padded = draw(st.booleans())
        groups = [g for g in (1, 1, 2, 4) if d % g == 0 and n % g == 0]
        up = nn.Conv2d(
            d, n, k1, stride=stride, padding=k1 // 2 if padded else 0, bias=draw(st.booleans()),
            groups=draw(st.sampled_from(groups)),
        )  # fmt: skip
        down = nn.Conv2d(
            n, d, k2, padding=k2 // 2 if padded else 0, bias=draw(st.booleans()), groups=draw(st.sampled_from(groups)),
            dilation=draw(st.sampled_from([1, 2])),
        )  # fmt: skip
        before = nn.BatchNorm2d(n) if draw(st.booleans()) else nn.Identity()
        after = draw(st.sampled_from([nn.BatchNorm2d(n), nn.Identity(), *_poolings()]))
        f = draw(st.sampled_from([nn.ReLU(), nn.GELU(), F.relu, F.silu, nn.PReLU(n)]))
        same = (
            isinstance(after, nn.BatchNorm2d | nn.Identity)
            and stride == 1
            and k1 == 1
            and (k2 == 1 or (padded and k2 == 3 and down.dilation == (1, 1)))
        )
        blocks.append(Block(up, f, down, before, after, residual=same and draw(st.booleans())))
    body = _randomised(nn.Sequential(*blocks), torch.float64)
    least = next(size for size in range(1, 257) if _runs_on(body, torch.randn(1, d, size, size, dtype=torch.float64)))
    size = draw(st.sampled_from([least, least + 1, max(least, 32)]))
    x = torch.randn(1, d, size, size, dtype=torch.float64)
    if not draw(st.booleans()):
        return body, x
    n, k = draw(st.integers(2, 6)), draw(st.sampled_from([1, 3]))
    last = nn.Conv2d(d, n, k, draw(st.integers(1, 2)), padding=draw(st.integers(k // 2, 2)), dtype=torch.float64)
    pooling = draw(st.sampled_from([nn.Identity(), nn.BatchNorm2d(n), *_poolings()]))
    if not _runs_on(nn.Sequential(body, last, pooling.double().eval()), x):
        pooling = nn.Identity()
    pixels = pooling(last(body(x)))[0].numel()
    head = [last, nn.ReLU(), nn.Dropout(), pooling, nn.Flatten(), nn.Linear(pixels, 3), nn.ReLU(), nn.Linear(3, 2)]
    return _randomised(nn.Sequential(*body, *head), torch.float64), x


def _poolings() -> list[nn.Module]:
    return [nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((28, 27))]


def _runs_on(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except RuntimeError:  # an image smaller than a kernel
        return False
    return True


def random_plan(sites: Iterable[Site], draw: Any, *, fits: bool = False) -> Plan:
    """Any mix of fates with arbitrary slopes and offsets, as far as the sites allow."""
    chosen = [site for site in sites if not site.followed]
    long = {m.name for site in chosen if site.between and draw(st.booleans()) for m in site.maps}
    chosen = [site for site in chosen if bool(site.between) == (site.maps[0].name in long or site.maps[1].name in long)]
    return Plan(tuple(random_entry(site, draw, fits=fits) for site in chosen))


def random_entry(site: Site, draw: Any, *, fits: bool = False) -> Entry:
    """Fates for one site, drawn by hypothesis (`draw`)."""
    n = site.width
    generator = torch.Generator().manual_seed(draw(seeds))
    mixes = ["linear", "drop", "keep", "keep drop", "keep linear", "linear drop", "keep linear drop"]
    if site.not_narrow:
        mixes = ["linear", "drop", "keep", "linear drop"]
    chosen = [Fate[name.upper()] for name in draw(st.sampled_from(mixes)).split()]
    padded = any(c.padding != (0, 0) for c in site.consumers)
    if site.not_linear:
        chosen = [fate for fate in chosen if fate != Fate.LINEAR] or [Fate.KEEP]
    if padded and site.norm_after and Fate.KEEP in chosen:
        chosen = [fate for fate in chosen if fate != Fate.DROP]
    fates = torch.tensor([int(fate) for fate in chosen], dtype=torch.int8)
    fates = fates[torch.randint(len(chosen), (n,), generator=generator)]
    if site.between:
        fates[0] = Fate.KEEP
    slopes = torch.randn(n, generator=generator, dtype=torch.float64)
    offsets = torch.randn(n, generator=generator, dtype=torch.float64) * draw(st.booleans())
    kept = int((fates == Fate.KEEP).sum())
    if padded and kept:
        offsets[fates == Fate.DROP] = 0
    alphas = None
    if draw(st.booleans()) and not site.between:
        alphas = torch.rand(draw(st.sampled_from([1, n])), generator=generator, dtype=torch.float64)
    family = "blend" if site.gated else draw(st.sampled_from(["blend", "prelu"]))
    grouped = any(m.groups > 1 for m in (site.producer, *site.consumers))
    fit = None
    if fits and not (kept and grouped) and draw(st.booleans()):
        fit = _random_fit(site, kept, draw, generator)
    becomes = draw(st.sampled_from(["", "", "apart", "pair"])) if fit is None and not site.gated and not kept else ""
    return Entry(site, fates, slopes, offsets, alphas, family, fit, becomes)


def _random_fit(site: Site, kept: int, draw: Any, generator: torch.Generator) -> Fit:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def kernel(m: Any) -> tuple[int, ...]:
        return m.kernel if m.kind == "conv2d" else ()

    path = "none" if site.not_linear or site.flattened else draw(st.sampled_from(["none", "pair", "full"]))
    convolution = site.producer.kind == "conv2d"
    path = "pair" if path == "full" and convolution and kept else path
    rank = draw(st.integers(1, 5))
    down = random(rank, site.producer.d_in, *kernel(site.producer)) if path == "pair" else None
    inner = rank if path == "pair" else site.producer.d_in
    kernels = [kernel(c) for c in site.consumers]
    if path == "full" and convolution:
        kernels = [_some_kernel(site.producer, c, draw) for c in site.consumers]
    shapes = [(c.d_out, inner, *k) for c, k in zip(site.consumers, kernels, strict=True)]
    rows = kept and draw(st.booleans()) and not (site.packed and not site.producer.bias)
    width = (kept, site.producer.d_in, *kernel(site.producer))
    return Fit(
        consumers=tuple(random(c.d_out, kept * site.block, *kernel(c)) for c in site.consumers),
        biases=tuple(random(c.d_out) for c in site.consumers),
        down=down,
        ups=tuple(random(*shape) for shape in shapes) if path != "none" else (),
        down_bias=random(rank) if down is not None and draw(st.booleans()) else None,
        producer=random(*width) if rows else None,
        producer_bias=random(kept) if rows and draw(st.booleans()) else None,
        gate=random(*width) if rows and site.gated else None,
        gate_bias=random(kept) if rows and site.gated and draw(st.booleans()) else None,
    )


def _some_kernel(producer: Any, consumer: Any, draw: Any) -> tuple[int, int]:
    """A kernel that keeps the size of what two convolutions give."""

    def fits(size: int) -> bool:
        try:
            fitted_map(producer, consumer, (size, size))
        except PlanError:
            return False
        return True

    exact = composed(producer, consumer, True).kernel
    return draw(st.sampled_from([exact, *[(k, k) for k in range(1, 6) if fits(k)]]))
