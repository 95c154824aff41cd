"""How parameters are used as weights of linear maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.channels.weights import uses_of
from shallower.recording.tracing import trace_forward


class Product(nn.Module):
    """A weight that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Standardised(nn.Conv2d):
    """A weight that is computed from the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / 2
        return F.conv2d(input, weight, self.bias)


@pytest.mark.parametrize(
    ("model", "shape", "sides", "multiplied", "output"),
    [
        (nn.Linear(4, 6), (5, 4), {"rows": 0, "columns": 1}, 5, -1),
        (nn.Conv2d(3, 6, 3), (2, 3, 5, 5), {"rows": 0, "columns": 1}, 18, 1),
        (nn.Conv1d(3, 6, 2), (2, 3, 5), {"rows": 0, "columns": 1}, 8, 1),
        (nn.ConvTranspose2d(3, 6, 2, stride=2), (1, 3, 2, 2), {"rows": 1, "columns": 0}, 4, 1),
        (Product(), (5, 4), {"rows": 1, "columns": 0}, 5, 0),
        (Standardised(3, 6, 1), (2, 3, 2, 2), {"rows": 0, "columns": 1}, 8, 1),
    ],
    ids=["linear", "convolution", "one dimension", "transposed", "product", "standardised"],
)
def test_sides(model: nn.Module, shape: tuple[int, ...], sides: dict[str, int], multiplied: int, output: int) -> None:
    trace = trace_forward(model, torch.randn(shape))
    use = uses_of(trace.weights[model, "weight"])
    assert {use.side(axis): axis for axis in range(2)} == sides
    assert (use.multiplied, use.output) == (multiplied, output)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.LSTM(4, 6, 2, bidirectional=True), ("weight_ih_l0", "weight_hh_l1_reverse")),
        (nn.GRU(4, 6), ("weight_ih_l0", "weight_hh_l0")),
        pytest.param(
            nn.LSTM(4, 6, proj_size=3),
            ("weight_ih_l0", "weight_hr_l0"),
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections"),
        ),
    ],
)
def test_weights_of_recurrent_layers(layer: nn.Module, weights: tuple[str, ...]) -> None:
    trace = trace_forward(layer, torch.randn(5, 2, 4))
    for weight in weights:
        use = uses_of(trace.weights[layer, weight])
        assert (use.side(0), use.side(1), use.multiplied) == ("rows", "columns", 10)


def test_weights_of_attention() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    trace = trace_forward(layer, (torch.randn(6, 2, 4), torch.randn(7, 2, 3), torch.randn(7, 2, 5)))
    times = {"q_proj_weight": 12, "k_proj_weight": 14, "v_proj_weight": 14}
    for (_, name), value in trace.weights.items():
        use = uses_of(value)
        if name == "weight":
            times[name] = 12
        if len(value.shape) == 2:
            assert (use.side(0), use.side(1), use.multiplied) == ("rows", "columns", times[name])
    packed = nn.MultiheadAttention(4, 2)
    trace = trace_forward(packed, (torch.randn(6, 2, 4), *[torch.randn(9, 2, 4)] * 2))
    assert uses_of(trace.weights[packed, "in_proj_weight"]).multiplied == 16


def test_what_is_no_weight_has_no_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    trace = trace_forward(model, torch.randn(2, 4))
    use = uses_of(trace.weights[model[1], "weight"])
    assert use.calls == []
    assert use.side(0) == ""


def test_an_einsum_says_what_the_axes_of_its_weight_are() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("q p, b p d -> b q d", self.mix, x)

    trace = trace_forward(Mixing(), torch.randn(2, 5, 4))
    use = uses_of(trace.weights[trace.model, "mix"])
    assert [use.side(axis) for axis in (0, 1)] == ["rows", "columns"]
    assert use.multiplied == 2 * 4
