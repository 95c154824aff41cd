"""Activations, however they are written, between maps in small hand-written and random networks."""

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

from shallower.finding.kinds import find_sites
from shallower.sites import Place
from tests.finding.linear.networks import Mlp, linear, only_site, reason, rows

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
