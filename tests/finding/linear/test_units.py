"""Layers that only look like plain linear maps and norms are skipped with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallower.sites import Place
from tests.finding.linear.networks import Mlp, hooked, linear, only_site, reason, rows

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
