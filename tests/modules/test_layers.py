"""Linear maps read and rebuilt, in their logical orientation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import PlanError
from shallower.modules.layers import (
    bias_of,
    check_shape,
    count_anew,
    is_the_map,
    kind_of,
    normal_after,
    resize_tensors,
    resized,
    resized_norm,
    weight_of,
)
from shallower.sites import LinearMap

transformers = pytest.importorskip("transformers")


def conv1d(d_in: int, d_out: int) -> nn.Module:
    return transformers.pytorch_utils.Conv1D(d_out, d_in)  # type: ignore[no-any-return]


class Own(nn.Linear):
    """A subclass with the stock forward and an attribute of its own."""

    note = "kept"


class Scaled(nn.Linear):
    """A subclass whose forward does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_kinds() -> None:
    assert [kind_of(m) for m in (nn.Linear(2, 3), nn.Conv2d(2, 3, 1), conv1d(2, 3), nn.ReLU())] == [
        "linear", "conv2d", "conv1d", "",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [nn.Linear, conv1d])
def test_a_weight_is_a_view_in_logical_orientation(make: Any) -> None:
    layer, x = make(4, 3), torch.randn(2, 4)
    bias = bias_of(layer)
    assert bias is not None
    torch.testing.assert_close(F.linear(x, weight_of(layer), bias), layer(x))
    weight_of(layer).zero_()
    assert not layer.weight.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.Linear, Own])
def test_a_layer_of_other_sizes_keeps_everything_else(make: Any, bias: bool) -> None:
    layer = make(4, 3, dtype=torch.float64)
    layer.requires_grad_(False)
    found = resized(layer, LinearMap("l", "linear", 6, 5, bias, 0))
    assert type(found) is make
    assert (found.in_features, found.out_features) == (6, 5)
    assert (found.bias is not None) == bias
    assert found.weight.dtype == torch.float64
    assert not found.weight.requires_grad
    assert found(torch.zeros(1, 6, dtype=torch.float64)).shape == (1, 5)
    assert layer.weight.shape == (3, 4)


def test_a_layer_whose_forward_is_its_own_becomes_the_stock_one() -> None:
    assert type(resized(Scaled(4, 3), LinearMap("l", "linear", 4, 2, True, 0))) is nn.Linear


def test_a_convolution_takes_the_geometry_and_keeps_its_memory_format() -> None:
    conv = nn.Conv2d(4, 6, 3, padding="same", bias=False).to(memory_format=torch.channels_last)
    same = resized(conv, LinearMap("c", "conv2d", 2, 6, False, 0, kernel=(3, 3), padding=(1, 1)))
    assert same.padding == "same"
    assert same.weight.is_contiguous(memory_format=torch.channels_last)
    other = resized(
        conv, LinearMap("c", "conv2d", 2, 6, True, 0, kernel=(5, 3), stride=(2, 1), padding=(2, 1), groups=2)
    )
    assert other(torch.zeros(1, 2, 8, 8)).shape == (1, 6, 4, 8)


def test_another_layer_than_the_plan_says_is_refused() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    fits = LinearMap("c", "conv2d", 4, 6, True, 0, kernel=(3, 3), padding=(1, 1))
    check_shape("site", conv, fits)
    assert is_the_map(conv, fits)
    for change, message in (
        ({"d_in": 5}, "input width 5"),
        ({"d_out": 5}, "output width 5"),
        ({"kernel": (1, 1)}, "kernel width"),
        ({"padding": (0, 0)}, "padding"),
        ({"bias": False}, "without a bias"),
        ({"kind": "linear"}, "is a Conv2d"),
    ):
        values = {**vars(fits), **change}
        with pytest.raises(PlanError, match=message):
            check_shape("site", conv, LinearMap(**values))


def test_a_narrower_norm_has_vectors_of_that_size() -> None:
    norm = nn.BatchNorm1d(4)
    small = resized_norm(norm, 3)
    sizes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    assert sizes == {
        **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (3,)),
        "num_batches_tracked": (),
    }
    assert norm.num_features == 4
    with pytest.raises(PlanError, match="LayerNorm"):
        resized_norm(nn.LayerNorm(4), 3)


def test_what_a_batchnorm_says_of_its_output() -> None:
    norm = nn.BatchNorm1d(2)
    norm.weight.data, norm.bias.data = torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 0.0])
    found = normal_after(norm)
    assert found is not None
    assert (found[0].tolist(), found[1].tolist()) == ([0.5, 0.0], [2.0, 1.0])
    assert normal_after(nn.LayerNorm(2)) is None
    plain = normal_after(nn.BatchNorm1d(2, affine=False))
    assert plain is not None
    assert plain[1].tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_recurrent_layer_runs_on_tensors_of_other_sizes() -> None:
    layer = nn.LSTM(6, 8, bidirectional=True, proj_size=4)
    made = nn.LSTM(5, 7, bidirectional=True, proj_size=3)
    for name, parameter in made.named_parameters():
        layer._parameters[name] = parameter
        count_anew(layer)
    assert (layer.input_size, layer.hidden_size, layer.proj_size) == (5, 7, 3)
    x = torch.randn(3, 2, 5)
    assert torch.equal(layer(x)[0], made(x)[0])


def test_a_recurrent_cell_counts_its_channels_anew() -> None:
    cell = nn.GRUCell(6, 8)
    for name, parameter in nn.GRUCell(5, 7).named_parameters():
        cell._parameters[name] = parameter
    count_anew(cell)
    assert (cell.input_size, cell.hidden_size) == (5, 7)


def test_tensors_get_new_shapes_wherever_they_are_held() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6)})
    model["b"].weight = model["a"].weight
    resize_tensors(model, {"a.weight": (3, 4), "norm.running_mean": (3,), "norm.weight": (3,)})
    assert model["b"].weight is model["a"].weight
    assert (model["b"].out_features, model["norm"].num_features) == (3, 3)
    assert model["norm"].running_mean.shape == (3,)
    assert "running_mean" in model["norm"]._buffers
    with pytest.raises(PlanError, match="no tensor 'weight' of 3 dimensions"):
        resize_tensors(model, {"a.weight": (3, 4, 1)})
