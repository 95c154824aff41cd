"""Gates, poolings and averages between activations and maps: what is found, what is skipped, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallower.finding.kinds import find_sites
from tests.finding.linear.networks import linear, only_site, reason, rows

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
