"""Sites of small hand-written networks: what is found, what is skipped, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.sites import Place, Residual, Site, Sites


class Mlp(nn.Module):
    """Two linear layers; what happens between them is given."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], width: int = 12, **modules: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, width), nn.Linear(12, 8)
        for name, module in modules.items():
            self.add_module(name, module)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return x + self.fc2(self.between(self, self.fc1(x)))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def only_site(model: nn.Module, inputs: Any) -> Site:
    sites = linear(model, inputs)
    assert len(sites) == 1, str(sites)
    return sites[0]


def linear(model: nn.Module, inputs: Any) -> Sites:
    """The sites whose channels may become linear; the reasons of all others are among those of what was skipped."""
    sites = find_sites(model, inputs)
    others = {site.name: str(site.bridge.not_linear) for site in sites if site.followed}
    return sites.only((site for site in sites if not site.followed), others)


def reason(model: nn.Module, inputs: Any) -> str:
    sites = linear(model, inputs)
    assert not sites, str(sites)
    assert sites.skipped, "nothing was skipped"
    return " | ".join(sites.skipped.values())


# ---------------------------------------------------------------------- activations, however they are written

MODULES = [
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu"),
    (nn.SiLU(), "silu"),
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Hardswish(), "hardswish"),
    (nn.ReLU6(), "relu6"),
    (nn.Hardtanh(), "hardtanh"),
    (nn.LeakyReLU(0.1), "leaky_relu"),
    (nn.ELU(), "elu"),
    (nn.SELU(), "selu"),
    (nn.CELU(), "celu"),
    (nn.Mish(), "mish"),
    (nn.Softplus(), "softplus"),
    (nn.PReLU(), "prelu"),
    (nn.Softshrink(), "softshrink"),
    (nn.RReLU(), "rrelu"),
    (nn.Threshold(0.1, 0.0), "threshold"),
]


@pytest.mark.parametrize(("module", "name"), MODULES, ids=lambda item: type(item).__name__)
def test_an_activation_module_is_found_with_its_name(module: nn.Module, name: str) -> None:
    site = only_site(nn.Sequential(nn.Linear(8, 12), module, nn.Linear(12, 4)), rows(3, 8))
    assert (site.activation, site.activation_name, site.width) == (Place("1"), name, 12)


def quick_gelu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


def exact_gelu(h: Tensor) -> Tensor:
    return h * 0.5 * (1.0 + torch.erf(h / 2**0.5))


def tanh_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * torch.pow(h, 3.0))))


CALLS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("F.relu", F.relu, "relu"),
    ("torch.relu", torch.relu, "relu"),
    ("Tensor.relu", lambda h: h.relu(), "relu"),
    ("Tensor.relu_", lambda h: h.relu_(), "relu"),
    ("F.relu in place", lambda h: F.relu(h, inplace=True), "relu"),
    ("F.gelu", F.gelu, "gelu"),
    ("F.gelu tanh", lambda h: F.gelu(h, approximate="tanh"), "gelu"),
    ("F.silu", F.silu, "silu"),
    ("torch.tanh", torch.tanh, "tanh"),
    ("F.leaky_relu", lambda h: F.leaky_relu(h, 0.2), "leaky_relu"),
    ("clamp", lambda h: h.clamp(min=0), "clamp"),
    ("quick gelu", quick_gelu, "quick gelu"),
    ("exact gelu", exact_gelu, "gelu"),
    ("tanh gelu", tanh_gelu, "gelu"),
    ("swish", lambda h: h * h.sigmoid(), "silu"),
    ("squared relu", lambda h: torch.square(F.relu(h)), "squared relu"),
    ("mish", lambda h: h * torch.tanh(F.softplus(h)), "mish"),
    ("relu times itself", lambda h: F.relu(h) * F.relu(h), "relu"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_an_activation_written_as_calls_is_found_in_the_forward_that_makes_them(call: Any) -> None:
    _, f, name = call

    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(f(self.fc1(x)))  # type: ignore[no-any-return]

    site = only_site(Network(lambda _, h: h), rows(3, 8))
    assert site.activation is not None
    assert site.activation.module == ""
    assert site.activation.calls
    assert site.activation_name == name


def test_a_tensor_made_in_the_forward_would_be_frozen_by_rewriting_it() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x) * torch.tensor(2.0)))  # type: ignore[no-any-return]

    assert "makes tensors of its own" in reason(Network(lambda _, h: h), rows(3, 8))


def test_a_cast_to_the_type_of_another_tensor_is_no_mixing() -> None:
    class Act(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return F.silu(h.double()).type_as(h)

    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)).type_as(x))  # type: ignore[no-any-return]

    assert only_site(Network(lambda _, h: h, act=Act()), rows(3, 8)).activation == Place("act")


def test_a_scale_alone_is_no_activation() -> None:
    sites = linear(Mlp(lambda _, h: h * 2 + 1), rows(3, 8))
    assert not sites


def test_a_custom_autograd_function_of_pointwise_calls_is_seen_through() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, h: Tensor) -> Tensor:
            return torch.relu(h) ** 2

    class Act(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return Square.apply(h)  # type: ignore[no-any-return]

    site = only_site(nn.Sequential(nn.Linear(8, 12), Act(), nn.Linear(12, 4)), rows(3, 8))
    assert site.activation == Place("1")


# ---------------------------------------------------------------------- gates


class Gated(nn.Module):
    def __init__(self, combine: Callable[[Any, Tensor], Tensor], hidden: int = 12, out: int = 12) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, hidden), nn.Linear(8, hidden), nn.Linear(out, 8)
        self.packed, self.norm = nn.Linear(8, 24), nn.LayerNorm(12)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.combine(self, x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["gate first", "up first"])
def test_a_gate_with_a_map_of_its_own_is_found_in_either_order(order: str) -> None:
    class Network(Gated):
        def forward(self, x: Tensor) -> Tensor:
            if order == "gate first":
                return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
            return self.down(self.up(x) * F.silu(self.gate(x)))  # type: ignore[no-any-return]

    site = only_site(Network(lambda _, x: x), rows(3, 8))
    assert site.kind == "gated"
    assert site.gate is not None
    assert site.producer is not None
    assert (site.gate.name, site.producer.name, site.activation_name) == ("gate", "up", "silu")


def test_a_packed_gate_knows_which_half_is_activated() -> None:
    class UpFirst(Gated):
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.packed(x).chunk(2, dim=-1)
            return self.down(up * F.gelu(gate))  # type: ignore[no-any-return]

    class GateFirst(Gated):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.packed(x).chunk(2, dim=-1)
            return self.down(up * F.gelu(gate))  # type: ignore[no-any-return]

    assert only_site(UpFirst(lambda _, x: x), rows(3, 8)).packed == "up-first"
    site = only_site(GateFirst(lambda _, x: x), rows(3, 8))
    assert (site.packed, site.width, site.kind) == ("gate-first", 12, "gated")


GATES: list[tuple[str, Callable[[Any, Tensor], Tensor], str]] = [
    ("a norm after the product", lambda m, x: m.norm(F.silu(m.gate(x)) * m.up(x)), "norm"),
    ("both factors activated", lambda m, x: F.silu(m.gate(x)) * F.relu(m.up(x)), "both factors"),
    ("different inputs", lambda m, x: F.silu(m.gate(x)) * m.up(x * 2), "different tensors"),
    ("glu", lambda m, x: F.glu(m.packed(x), dim=-1), "glu"),
    ("fixed split", lambda m, x: F.silu(m.packed(x)[..., :12]) * m.packed(x)[..., 12:], ""),
    ("interleaved", lambda m, x: (lambda h: F.silu(h[..., ::2]) * h[..., 1::2])(m.packed(x)), "cut|interleaved"),
]


@pytest.mark.parametrize("case", GATES, ids=lambda case: case[0])
def test_an_unusable_gate_is_skipped_with_the_reason(case: Any) -> None:
    _, combine, why = case
    sites = linear(Gated(combine), rows(3, 8))
    assert not sites, str(sites)
    if why:
        assert re.search(why, " ".join(sites.skipped.values())), str(sites)


# ---------------------------------------------------------------------- adversaries


def registered(between: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    return Mlp(between, **modules)


class Quantised(nn.Module):
    """Weights in eight bits, as several libraries have them."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("weight", torch.ones(d_out, d_in, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return F.linear(x, self.weight.to(x.dtype))


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.1


class RootMeanSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def with_first(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.ReLU(), nn.Linear(12, 8))


def hooked(name: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 12))
    model[3].weight = model[0].weight
    return model


def tied_to_embedding() -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(self.embed(ids))))  # type: ignore[no-any-return]

    return Network()


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    nn.utils.parametrizations.orthogonal(model[0])
    return model


class Shared(nn.Module):
    """One linear layer in two sites with different activations."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.relu, self.gelu = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.relu(self.fc(x))) + self.b(self.gelu(self.fc(x)))  # type: ignore[no-any-return]


class Keeps(Mlp):
    def forward(self, x: Tensor) -> Any:
        self.last = F.relu(self.fc1(x))
        return self.fc2(self.last)


class Returns(Mlp):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.fc1(x))
        return {"y": self.fc2(h), "hidden": (h,)}


class Decides(Mlp):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.fc1(x))
        return self.fc2(h) if h.sum() > -1 else x


class Reads(Mlp):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x))) * self.fc1.weight.mean()


class Functional(Mlp):
    def forward(self, x: Tensor) -> Any:
        return F.linear(F.relu(self.fc1(x)), self.fc2.weight, self.fc2.bias)


class ThroughView(Mlp):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.fc1(x))
        h[:, :2].zero_()
        return self.fc2(h)


def batch_norm(tracked: bool = True) -> nn.Module:
    return nn.BatchNorm1d(12, track_running_stats=tracked)


MIXED = torch.ones(12)

SKIPPED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("a second reader", lambda: Mlp(lambda m, h: m.act(h) * m.act(h).mean(), act=nn.ReLU()), "read|mixed"),
    ("a decision on the values", lambda: Decides(lambda _, h: h), "also read by `sum`"),
    ("an output of the model", lambda: Returns(lambda _, h: h), "output of the model"),
    ("kept on a module", lambda: Keeps(lambda _, h: h), "output of the model"),
    ("tied to another layer", tied, "tied to 3"),
    ("shared by two sites", Shared, "fc is also called"),
    ("parametrized", parametrized, "parametriz"),
    ("quantised", lambda: with_first(Quantised(8, 12)), "quantised"),
    ("a low-rank adapter", lambda: with_first(Adapted(nn.Linear(8, 12))), r"merge_and_unload\(\)"),
    ("another forward", lambda: with_first(Noisy(8, 12)), "Noisy with a forward of its own"),
    ("a layer norm", lambda: Mlp(lambda m, h: m.norm(m.act(h)), norm=nn.LayerNorm(12), act=nn.ReLU()), "norm"),
    ("a norm by hand", lambda: Mlp(lambda m, h: m.n(m.act(h)), n=RootMeanSquare(), act=nn.ReLU()), "n .RootMeanSquare"),
    ("a reshape", lambda: Mlp(lambda m, h: m.act(h).view(-1, 2, 6).mT.reshape(-1, 12), act=nn.ReLU()), "reshape"),
    ("a reshape before", lambda: Mlp(lambda m, h: m.act(h.view(-1, 3, 4)).flatten(1), act=nn.ReLU()), "reshape"),
    ("an unknown tensor", lambda: Mlp(lambda m, h: m.act(h) * MIXED, act=nn.ReLU()), "unknown tensor"),
    ("an unknown shift", lambda: Mlp(lambda m, h: m.act(h) + MIXED, act=nn.ReLU()), "unknown tensor"),
    ("a reshape like another", lambda: Mlp(lambda _, h: F.relu(h.flatten(1).reshape_as(h))), "reshape"),
    ("a softmax", lambda: Mlp(lambda m, h: m.soft(m.act(h)), act=nn.ReLU(), soft=nn.Softmax(-1)), "soft .Softmax"),
    ("a hook on a layer", lambda: hooked("0"), "0 has a forward hook"),
    ("a hook on the activation", lambda: hooked("1"), "1 has a forward hook"),
    ("weights read elsewhere", lambda: Reads(lambda _, h: h), "also read by `mean`"),
    ("weights in a functional call", lambda: Functional(lambda _, h: h), "by calling its module"),
    ("written through a view", lambda: ThroughView(lambda _, h: h), "view|read"),
    ("no running statistics", lambda: Mlp(lambda m, h: F.relu(m.n(h)), n=batch_norm(False)), "running statistics"),
    ("two norms", lambda: Mlp(lambda m, h: F.relu(m.b(m.a(h))), a=batch_norm(), b=batch_norm()), "more than one norm"),
    ("two names", lambda: nn.Sequential(*(lambda fc: (fc, nn.ReLU(), nn.Linear(12, 8), fc))(nn.Linear(8, 12))), "name"),
]  # fmt: skip


@pytest.mark.parametrize("case", SKIPPED, ids=lambda case: case[0])
def test_what_only_looks_like_a_site_is_skipped_with_the_reason(case: Any) -> None:
    _, make, why = case
    assert re.search(why, reason(make(), rows(4, 8)))


def test_a_weight_tied_to_an_embedding_is_skipped() -> None:
    assert "tied to embed" in reason(tied_to_embedding(), torch.tensor([[1, 2, 3]]))


def test_a_tie_outside_of_the_site_does_not_matter() -> None:
    model = tied_to_embedding()
    model.add_module("fc2", nn.Linear(8, 8))
    body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(20, 8), body, nn.Linear(8, 20)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.out(x + self.body(x))  # type: ignore[no-any-return]

    assert only_site(Network(), torch.tensor([[1, 2, 3]])).name == "body"


CONVOLUTIONS: list[tuple[str, nn.Module, str]] = [
    ("transposed", nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)), "ConvTranspose2d"),
    (
        "pooled with zeros",
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(8, 8, 3)),
        "pooling",
    ),
    (
        "pooled in front of groups",
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2)),
        "pooling .* grouped",
    ),
    (
        "flattened from a column on",
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 3)),
        "reshape",
    ),
    ("linear on the width", nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Linear(8, 3)), "different dimensions"),
    ("uneven padding", nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 2, padding="same")), "one side"),
]


# PyTorch warns of it once a process: whichever test comes first
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case[0])
def test_an_unusable_convolution_is_skipped_with_the_reason(case: Any) -> None:
    _, model, why = case
    assert re.search(why, reason(model, rows(2, 4, 8, 8)))


def test_a_one_dimensional_convolution_is_skipped_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3))
    assert "Conv1d" in reason(model, rows(2, 4, 8))


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}, True),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 1, "stride": 2}, True),
        ({"kernel_size": 1}, {"kernel_size": 3}, True),
        ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 1, "stride": 2}, {"kernel_size": 3}, True),
        ({"kernel_size": 1, "padding": 1}, {"kernel_size": 3}, True),
        ({"kernel_size": 3}, {"kernel_size": 3}, True),
        ({"kernel_size": 3, "padding": 2, "stride": 2}, {"kernel_size": 3, "dilation": 2}, True),
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1}, False),
    ],
)
def test_convolutions_may_become_linear_and_merge_where_all_padding_is_zero(
    first: Any, second: Any, allowed: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, **first), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, **second))
    site = only_site(model, rows(2, 4, 12, 12).to(memory_format=torch.channels_last))
    assert site.channels_first
    assert site.kind == "convolution"
    assert site.norm_before == "1"
    assert site.not_linear == ""
    assert (site.not_merged == "") == allowed


def test_channels_on_the_two_sides_of_a_grouped_convolution_cannot_be_narrowed_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    sites = linear(model, rows(2, 4, 8, 8))
    assert [site.not_linear for site in sites] == ["", ""]
    assert all("2 is a grouped convolution" in site.not_narrow for site in sites)


# ---------------------------------------------------------------------- through global average pooling


class Averaged(nn.Module):
    """conv - ReLU - what is given - linear or 1x1 convolution."""

    def __init__(self, average: Callable[[Tensor], Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Linear(12, 5) if last is None else last
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.average(self.act(self.conv(x))))  # type: ignore[no-any-return]


AVERAGES: list[tuple[str, nn.Module]] = [
    ("pooled and flattened", Averaged(lambda z: F.adaptive_avg_pool2d(z, 1).flatten(1))),
    ("pooled and reshaped", Averaged(lambda z: F.adaptive_avg_pool2d(z, 1).reshape(z.shape[0], -1))),
    ("pooled by its size", Averaged(lambda z: F.avg_pool2d(z, 6).flatten(1))),
    ("the mean", Averaged(lambda z: z.mean((2, 3)))),
    ("the mean, from behind", Averaged(lambda z: z.mean([-1, -2]))),
    ("kept as an image", Averaged(lambda z: z.mean((2, 3), keepdim=True), nn.Conv2d(12, 5, 1))),
]


@pytest.mark.parametrize("case", AVERAGES, ids=lambda case: case[0])
def test_a_map_that_reads_the_average_over_all_pixels_is_a_consumer(case: Any) -> None:
    _, model = case
    site = only_site(model, rows(2, 4, 8, 8))
    assert (site.width, site.channels_first, site.averaged) == (12, True, True)
    assert "average" in site.not_merged
    assert site.params_collapsed == site.params


NO_AVERAGES: list[tuple[str, nn.Module, str]] = [
    ("over channels", Averaged(lambda z: z.mean((1, 2)), nn.Linear(6, 5)), "pooling"),
    ("a larger kernel", Averaged(lambda z: z.mean((2, 3), True), nn.Conv2d(12, 5, 3, padding=1)), "larger than 1x1"),
]


@pytest.mark.parametrize("case", NO_AVERAGES, ids=lambda case: case[0])
def test_other_pooling_stands_between(case: Any) -> None:
    _, model, why = case
    assert re.search(why, reason(model, rows(2, 4, 8, 8)))


POOLED: list[tuple[str, nn.Module, str, tuple[int, int]]] = [
    ("a maximum", Averaged(lambda z: F.adaptive_max_pool2d(z, 1).flatten(1)), "adaptive_max_pool2d", (1, 1)),
    ("four pixels", Averaged(lambda z: F.adaptive_avg_pool2d(z, 2).flatten(1), nn.Linear(48, 5)),
     "adaptive_avg_pool2d", (2, 2)),
    ("two poolings", Averaged(lambda z: F.avg_pool2d(F.max_pool2d(z, 2), 3, 1, 1, count_include_pad=False).flatten(1),
                              nn.Linear(108, 5)), "max_pool2d, avg_pool2d", (3, 3)),
    ("a convolution", Averaged(lambda z: F.max_pool2d(z, 2), nn.Conv2d(12, 5, 3, padding=1)), "max_pool2d", (0, 0)),
    ("a module that keeps the size", Averaged(nn.MaxPool2d(3, 1, 1), nn.Conv2d(12, 5, 3)), "max_pool2d", (0, 0)),
    ("a larger image", Averaged(lambda z: F.interpolate(z, scale_factor=2), nn.Conv2d(12, 5, 3)), "interpolate",
     (0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("case", POOLED, ids=lambda case: case[0])
def test_channels_behind_a_pooling_can_be_narrowed_and_the_activation_alone_can_go(case: Any) -> None:
    _, model, pooled, pixels = case
    site = only_site(model, rows(2, 4, 8, 8))
    assert (site.width, site.pooled, site.block) == (12, pooled, max(1, pixels[0] * pixels[1]))
    assert "the pooling" in site.not_linear
    assert site.not_narrow == ""
    (place,) = find_sites(model, rows(2, 4, 8, 8), kinds="activation")
    assert place.activation == site.activation


@pytest.mark.parametrize(
    "flatten",
    [lambda z: z.flatten(1), lambda z: z.view(z.shape[0], -1), lambda z: torch.reshape(z, (z.size(0), -1))],
)
def test_a_linear_layer_over_all_pixels_is_a_consumer(flatten: Callable[[Tensor], Tensor]) -> None:
    site = only_site(Averaged(flatten, nn.Linear(12 * 6 * 4, 5)), rows(2, 4, 8, 6))
    assert (site.width, site.block, site.flattened) == (12, 24, True)
    assert site.consumers[0].size == (6, 4)
    assert site.not_linear == site.not_merged == site.not_narrow == ""
    assert site.params_collapsed == 4 * 8 * 6 * 5 + 5


def test_a_view_that_says_how_many_features_there_are_is_named() -> None:
    model = Averaged(lambda z: z.view(-1, 12 * 6 * 6), nn.Linear(12 * 6 * 6, 5))
    assert "how many features there are; flatten" in reason(model, rows(2, 4, 8, 8))


def test_an_image_that_a_linear_layer_makes_has_its_channels_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    assert "reshape" in reason(model, rows(2, 4, 8, 8))


def test_squeeze_and_excitation_is_named() -> None:
    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.squeeze, self.last = nn.Conv2d(4, 12, 3), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = F.relu(self.conv(x))
            return self.last(z * torch.sigmoid(self.squeeze(z.mean((2, 3), keepdim=True))))  # type: ignore[no-any-return]

    assert "excitation" in reason(Excited(), rows(2, 4, 8, 8))
    places = find_sites(Excited(), rows(2, 4, 8, 8), kinds=("hidden", "activation"))
    assert [place.activation_name for place in places if place.kind == "activation"] == ["relu"]


# ---------------------------------------------------------------------- through depthwise convolutions


def inverted(*between: nn.Module) -> nn.Sequential:
    """expand - BatchNorm - ReLU - depthwise - what is given - project."""
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), depthwise, *between, nn.Conv2d(8, 4, 1)
    )


def long_site(model: nn.Module) -> Site | None:
    return next((site for site in linear(model, rows(2, 4, 8, 8)) if site.between), None)


def test_an_inverted_residual_is_two_short_sites_and_a_long_one() -> None:
    sites = find_sites(inverted(nn.BatchNorm2d(8), nn.SiLU()), rows(2, 4, 8, 8))
    short = [(s.producer.name, s.consumers[0].name) for s in sites if s.not_narrow and s.producer is not None]
    assert short == [("0", "3"), ("3", "6")]
    assert len(sites) == 3
    (long,) = (site for site in sites if site.between)
    assert [m.name for m in long.maps] == ["0", "3", "6"]
    assert (long.width, long.norm_before, long.not_narrow) == (8, "1", "")
    assert "0 - 3 and 3 - 6" in long.not_linear
    (between,) = long.between
    assert (between.map.groups, between.norm_before, between.activation) == (8, "4", Place("5"))


def test_a_long_site_needs_no_activation_behind_its_depthwise_convolution() -> None:
    long = long_site(inverted(nn.BatchNorm2d(8)))
    assert long is not None
    (between,) = long.between
    assert (between.norm_before, between.activation) == ("4", None)
    assert [consumer.name for consumer in long.consumers] == ["5"]


def test_a_long_site_goes_through_several_depthwise_convolutions() -> None:
    long = long_site(inverted(nn.ReLU(), nn.Conv2d(8, 8, 5, groups=8), nn.BatchNorm2d(8), nn.ReLU()))
    assert long is not None
    assert [between.map.name for between in long.between] == ["3", "5"]


STOPS: list[tuple[str, list[nn.Module]]] = [
    ("a layer norm", [nn.GroupNorm(1, 8), nn.ReLU()]),
    ("pooling", [nn.ReLU(), nn.MaxPool2d(2)]),
    ("a norm of the batch", [nn.BatchNorm2d(8, track_running_stats=False)]),
    ("a hooked layer", [hooked("1")]),
]


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case[0])
def test_a_long_site_ends_where_something_mixes_channels_or_is_unusable(case: Any) -> None:
    _, modules = case
    assert long_site(inverted(*modules)) is None if case[0] != "a hooked layer" else True


def test_a_depthwise_convolution_that_is_called_elsewhere_is_in_no_long_site() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = inverted(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.body[3](self.body[0](x)).mean()  # type: ignore[no-any-return]

    assert long_site(Network()) is None


# ---------------------------------------------------------------------- sums that close around a site


class Skip(nn.Module):
    """x + body(x), or what `combine` makes of the two."""

    def __init__(self, body: nn.Module, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.body = body
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.body(x))


def body(*last: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Dropout(dropout), *last)


def test_the_sum_around_a_site_is_found_with_its_branch_and_norm() -> None:
    residual = only_site(Skip(body(nn.BatchNorm1d(8))), rows(3, 8)).residual
    assert residual == Residual(Place("", (("add", 0),)), branch=1, norm="body.4", source="body.0")
    turned = only_site(Skip(body(), lambda x, y: y + x), rows(3, 8)).residual
    assert turned == Residual(Place("", (("add", 0),)), branch=0, source="body.0")


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that goes on with an activation, as timm's do."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels)
        self.drop, self.act, self.other = nn.Identity(), nn.SiLU(inplace=True), eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.other
        )
        return self.act(self.drop(x))  # type: ignore[no-any-return]


def test_a_norm_with_the_activation_inside_is_a_norm_before_an_activation() -> None:
    site = only_site(nn.Sequential(nn.Conv2d(4, 8, 1), NormAct(8), nn.Conv2d(8, 4, 3)), rows(2, 4, 8, 8))
    assert (site.norm_before, site.activation, site.activation_name) == ("1", Place("1.act"), "silu")
    assert site.norm_params == 2


def test_a_norm_with_an_activation_inside_that_computes_something_else_is_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), NormAct(8, eps=1e-3), nn.Conv2d(8, 4, 3))
    assert "norm `batch_norm`" in reason(model, rows(2, 4, 8, 8))


def test_the_sum_around_a_chain_is_that_of_its_last_site_and_of_the_long_one() -> None:
    sites = find_sites(Skip(inverted(nn.BatchNorm2d(8), nn.ReLU())), rows(2, 4, 8, 8))
    first, long, last = sorted(sites, key=lambda site: (site.producer.name, bool(site.between)))  # type: ignore[union-attr]
    assert first.residual is None
    assert long.between
    assert last.residual == long.residual == Residual(Place("", (("add", 0),)), branch=1, source="body.0")


def test_parameters_of_norms_and_activations_are_told() -> None:
    act = nn.PReLU(12)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
            self.norm, self.bare, self.act = nn.BatchNorm1d(12), nn.BatchNorm1d(12, affine=False), act

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.bare(self.b(self.act(self.norm(self.a(x)))))))  # type: ignore[no-any-return]

    sites = linear(Network(), rows(3, 8))
    assert [(s.norm_params, s.activation_params, s.activation_shared) for s in sites] == [(2, 12, True), (0, 12, True)]
    alone = only_site(nn.Sequential(nn.Linear(8, 12), nn.PReLU(), nn.Linear(12, 4)), rows(3, 8))
    assert (alone.norm_params, alone.activation_params, alone.activation_shared) == (0, 1, False)
    assert [(s.activation_origin, s.activation_calls) for s in (*sites, alone)] == [("act", 2), ("act", 2), ("1", 1)]


class Elsewhere(nn.Module):
    """Hands its input on in eval mode, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(()) if self.training else x


SUMS: list[tuple[str, nn.Module]] = [
    ("dropout in between", Skip(body(dropout=0.1))),
    ("stochastic depth in between", Skip(body(Elsewhere()))),
    ("another scale", Skip(body(), lambda x, y: torch.add(x, y, alpha=2))),
    ("another summand", Skip(body(), lambda x, y: 2 * x + y)),
    ("a product", Skip(body(), lambda x, y: x * y)),
    ("a second reader", Skip(body(), lambda x, y: (x + y) * y)),
    ("an activation in between", Skip(body(nn.ReLU()))),
    ("a layer norm in between", Skip(body(nn.LayerNorm(8)))),
    ("a forward that cannot be rewritten", Skip(body(), lambda x, y: x + y if x.sum() > -1e9 else y)),
]


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case[0])
def test_a_sum_that_could_not_be_taken_away_is_no_residual(case: Any) -> None:
    _, model = case
    assert only_site(model, rows(3, 8)).residual is None


# ---------------------------------------------------------------------- places of shared modules and dropouts


def test_one_activation_object_under_several_names_is_found_under_each() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 4))
    assert [site.activation for site in linear(model, rows(3, 8))] == [Place("1"), Place("3")]


def test_one_activation_object_in_several_blocks_is_found_in_each() -> None:
    act = nn.ReLU()
    model = nn.Sequential(*(Mlp(lambda m, h: m.act(h), act=act) for _ in range(3)))
    assert [site.activation for site in linear(model, rows(3, 8))] == [Place(f"{i}.act") for i in range(3)]


def test_an_activation_module_called_twice_is_split_by_its_calls() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))  # type: ignore[no-any-return]

    sites = linear(Network(), rows(3, 8))
    assert [site.activation for site in sites] == [Place("", (("self.act", 0),)), Place("", (("self.act", 1),))]


def test_an_activation_that_cannot_be_rewritten_is_skipped_with_the_reason() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(h) if x.sum() > -1e9 else x  # type: ignore[no-any-return]

    assert "cannot be traced" in reason(Network(lambda _, h: h), rows(3, 8))


def test_dropouts_on_the_way_are_named() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(torch.relu(self.fc1(x)))
            return self.fc2(F.dropout(h, 0.1, self.training))  # type: ignore[no-any-return]

    site = only_site(Network(lambda _, h: h, drop=nn.Dropout(0.2)), rows(3, 8))
    assert set(site.dropouts) == {Place("drop"), Place("", (("dropout", 0),))}


def test_a_block_run_several_times_is_one_site_with_as_many_calls() -> None:
    block = Mlp(lambda m, h: m.act(h), act=nn.GELU())
    model = nn.Sequential(block, block, block)
    site = only_site(model, rows(3, 8))
    assert site.calls == 3
    assert site.producer is not None
    assert site.producer.positions == 9
    assert site.activation == Place("0.act")


def test_several_readers_that_are_all_linear_are_consumers() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Any:
            h = self.act(self.fc1(x))
            return self.fc2(h), self.other(h)

    site = only_site(Network(lambda _, h: h, act=nn.ReLU(), other=nn.Linear(12, 3)), rows(3, 8))
    assert [consumer.name for consumer in site.consumers] == ["fc2", "other"]


# ---------------------------------------------------------------------- models of every kind


def test_a_fused_encoder_layer_is_found_with_its_activation_as_a_call() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=nn.GELU())
    site = only_site(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), rows(2, 5, 16))
    assert site.activation == Place("layers.0", (("self.activation", 0),))
    assert site.kind == "feed-forward"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_parts_are_run_eagerly() -> None:
    inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model = nn.Sequential(torch.compile(inner), nn.LayerNorm(8))
    site = only_site(model, rows(3, 8))
    assert site.activation is not None
    assert model.get_submodule(site.activation.module) is inner[1]


def test_fake_tensors_are_enough() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        fake = torch.randn(3, 8)
        weight = model[0].weight
        assert only_site(model, fake).width == 12
    assert only_site(model, rows(3, 8)).width == 12
    assert model[0].weight is weight


def test_the_sites_of_a_model_without_data_equal_those_with() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    real = linear(model, rows(3, 8))
    meta = linear(model.to("meta"), rows(3, 8))
    assert (real.ordered, real.macs, real.params) == (meta.ordered, meta.macs, meta.params)


def test_a_language_model_of_seven_billion_parameters_needs_neither_time_nor_memory() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    sites = linear(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
    assert sites.params > 6.7e9
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp" for i in range(32)]
    assert {(site.kind, site.width) for site in sites} == {("gated", 11008)}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_bfloat16_and_autocast_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    plain = linear(model, rows(3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(model, rows(3, 8)).ordered == plain.ordered
    assert linear(model.bfloat16(), rows(3, 8).bfloat16()).ordered == plain.ordered


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(), nn.ReLU(), nn.Linear(12, 8)).train()
    model[3].eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    linear(model, rows(3, 8))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_told_from_features() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", rows(5, 2))
            self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
            self.out = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.mlp(self.table).squeeze(-1))  # type: ignore[no-any-return]

    assert only_site(Network(), rows(3, 5)).kind == "position MLP"


# ---------------------------------------------------------------------- errors


def test_inputs_that_do_not_fit_show_the_error_and_how_inputs_are_given() -> None:
    with pytest.raises(SiteError, match=r"(?s)mat1 and mat2.*tuple of its positional arguments"):
        linear(nn.Linear(8, 4), rows(3, 7))


def test_a_failed_search_leaves_no_hooks_behind() -> None:
    from torch.nn.modules import module

    with pytest.raises(SiteError):
        linear(nn.Linear(8, 4), rows(3, 7))
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.ReLU(), "no parameters"),
        (F.relu, "torch.nn.Module"),
        (nn.Sequential(nn.LazyLinear(4)), "lazy"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, why: str) -> None:
    with pytest.raises(SiteError, match=why):
        linear(model, rows(3, 8))


# ---------------------------------------------------------------------- random networks

LAYERS = ["relu", "gelu", "tanh", "batchnorm", "dropout", "layernorm", "linear", "identity"]


@st.composite
def sequences(draw: st.DrawFn) -> list[str]:
    return ["linear", *draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=12)), "linear"]


def build(names: list[str]) -> nn.Sequential:
    made: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "tanh": nn.Tanh,
        "batchnorm": lambda: nn.BatchNorm1d(6),
        "dropout": nn.Dropout,
        "layernorm": lambda: nn.LayerNorm(6),
        "linear": lambda: nn.Linear(6, 6),
        "identity": nn.Identity,
    }
    return nn.Sequential(*(made[name]() for name in names))


def expected_sites(names: list[str]) -> list[tuple[str, str]]:
    """(producer, consumer) of the sites in a sequence, read off the names alone."""
    linear = [i for i, name in enumerate(names) if name == "linear"]
    found = []
    for start, end in pairwise(linear):
        between = [name for name in names[start + 1 : end] if name not in ("dropout", "identity")]
        inner = "".join({"batchnorm": "n", "layernorm": "x"}.get(name, "f") for name in between)
        if re.fullmatch(r"n?f+n?", inner):
            found.append((str(start), str(end)))
    return found


@given(names=sequences())
@settings(max_examples=60)
def test_exactly_the_usable_sites_of_a_random_sequence_are_found(names: list[str]) -> None:
    sites = linear(build(names), rows(3, 6))
    found = [(site.producer.name, site.consumers[0].name) for site in sites if site.producer is not None]
    assert found == expected_sites(names)


@given(names=sequences())
@settings(max_examples=30)
def test_every_activation_is_a_site_or_a_place_on_request(names: list[str]) -> None:
    sites = find_sites(build(names), rows(3, 6), kinds=("hidden", "activation"))
    listed = [site.activation.module for site in sites if site.activation is not None and not site.activation.calls]
    alone = [
        str(i)
        for i, name in enumerate(names)
        if name in ("relu", "gelu", "tanh")
        and not ({names[i - 1], names[i + 1]} & {"relu", "gelu", "tanh", "dropout", "identity"})
    ]
    assert set(alone) <= set(listed)
    assert len(set(listed)) == len(listed)


def test_a_call_that_hands_back_a_buffer_is_no_activation() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(4))
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x * self.frequencies.float())))  # type: ignore[no-any-return, operator]

    assert [site.name for site in find_sites(Rotary(), rows(2, 4), kinds=("hidden", "activation"))] == ["up"]
