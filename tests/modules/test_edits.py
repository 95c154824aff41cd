"""Edits change a model, are remembered, written to files and done again; a hostile list of them is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import CheckpointError, PlanError
from shallower.modules.activations import Operand, PartialActivation, SlopeActivation, Twice
from shallower.modules.edits import (
    Activation,
    Attribute,
    Doubled,
    Edit,
    Externalise,
    Identity,
    Norm,
    Padding,
    Partial,
    Resize,
    Sized,
    Slope,
    Summand,
    Weights,
    decoded,
    edits,
    encoded,
    perform,
    replay,
)


class Net(nn.Module):
    """One layer of each kind that an edit changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.linear = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.PReLU(4),
            nn.Linear(4, 3),
        )
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.act(self.norm(F.relu(self.conv(x)))).mean((2, 3)))
        return y


RESIZE = Resize("linear", "linear", 4, 6, True, (1, 1), (1, 1), (0, 0), (1, 1), 1)
ALL: list[Edit] = [
    Externalise("", (("relu", 0),)),
    RESIZE,
    Norm("norm", 3),
    Activation("act", 2),
    Slope("act", 2, "blend", "identity", True, "float32"),
    Partial("act", 1, 1, "", True),
    Padding("conv", (2, 1)),
    Attribute("", "heads", 3),
    Doubled("norm", True),
    Summand("relu_0", 1),
    Identity("conv"),
]


def test_every_edit_does_what_it_says() -> None:
    model = Net()
    for edit in ALL[:8]:
        perform(model, edit)
    assert model.linear.out_features == 6
    assert model.norm.num_features == 3
    assert (type(model.act), type(model.act.f), type(model.act.f.f)) == (PartialActivation, SlopeActivation, nn.PReLU)
    assert model.act.f.slope.shape == model.act.f.f.weight.shape == (2,)
    assert model.conv.padding == (2, 1)
    assert model.heads == 3
    assert isinstance(model.relu_0, nn.ReLU)
    for edit in ALL[8:]:
        perform(model, edit)
    assert [type(m) for m in (model.norm, model.relu_0, model.conv)] == [Twice, Operand, nn.Identity]


def test_edits_are_remembered_in_order_and_done_again_through_a_file() -> None:
    model, fresh = Net(), Net().to("meta")
    for edit in ALL:
        perform(model, edit)
    assert edits(model) == ALL
    text = json.dumps([encoded(edit) for edit in edits(model)])
    assert [decoded(i, data) for i, data in enumerate(json.loads(text))] == ALL
    replay(fresh, json.loads(text))
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


def test_a_tensor_without_elements_is_narrowed_through_a_file() -> None:
    # register tokens of a model that has none
    model, fresh = nn.Module(), nn.Module()
    for each in (model, fresh):
        each.registers = nn.Parameter(torch.empty(1, 0, 4))
    perform(model, Sized("", "registers", (1, 0, 2)))
    replay(fresh, json.loads(json.dumps([encoded(edit) for edit in edits(model)])))
    assert fresh.get_parameter("registers").shape == (1, 0, 2)


def test_weights_are_set_in_the_type_of_the_layer_and_not_remembered() -> None:
    model = Net().half()
    numbers = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    perform(model, Weights("linear", {"weight": numbers, "bias": torch.ones(3)}))
    assert torch.equal(model.linear.weight, numbers.half())
    assert edits(model) == []


@pytest.mark.parametrize("name", ["weight", "bias", "nothing"])
def test_weights_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cannot take numbers"):
        perform(Net(), Weights("linear", {name: torch.ones(7)}))


def test_what_is_gone_keeps_its_settings_for_a_forward_that_reads_them() -> None:
    model = Net()
    perform(model, Identity("conv"))
    assert (model.conv.stride, model.conv.out_channels, model.conv.kernel_size) == ((1, 1), 4, (3, 3))
    assert not list(model.conv.parameters())


def test_the_mode_of_what_stood_there_stays() -> None:
    model = Net().eval()
    perform(model, RESIZE)
    assert not model.linear.training


# ---------------------------------------------------------------------- hostile files


GOOD = {"edit": "identity", "name": "1"}
MAP = {"edit": "map", "name": "0", "kind": "linear", "d_in": 6, "d_out": 3, "bias": True, "kernel": [1, 1],
       "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("identity", "a list"),
        (["identity"], "edit 0 of the saved model"),
        ([{"edit": "exec", "name": "1"}], "edit 0 of the saved model"),
        ([{**GOOD, "name": "9"}], "does not fit the model"),
        ([{**GOOD, "name": "0.weight"}], "does not fit the model"),
        ([{**GOOD, "name": 3}], "name: 3 is not a text"),
        ([{**GOOD, "name": ""}], "of length from 1"),
        ([{**GOOD, "extra": 1}], "'extra' is not a key"),
        ([{"edit": "identity"}], "`name` is missing"),
        ([{**MAP, "d_out": 10**15}], "a number from 1"),
        ([{**MAP, "d_out": 2**24, "d_in": 2**24}], "weights"),
        ([{**MAP, "d_out": -1}], "a number from 1"),
        ([{**MAP, "d_out": True}], "not a whole number"),
        ([{**MAP, "groups": 4}], "groups do not divide"),
        ([{**MAP, "kernel": [1]}], "a list of 2"),
        ([{**MAP, "kind": "conv2d"}], "does not fit the model"),
        ([{**MAP, "name": "1"}], "does not fit the model"),
        ([{"edit": "operand", "name": "1", "index": 2}], "a number from 0 to 1"),
        ([{"edit": "attribute", "name": "0", "attribute": "in_features", "value": -1}], "a number from 0"),
        ([{"edit": "attribute", "name": "0", "attribute": "forward", "value": 1}], "does not fit the model"),
        ([{"edit": "attribute", "name": "0", "attribute": "training", "value": 1}], "does not fit the model"),
        ([{"edit": "norm", "name": "0", "channels": 3}], "does not fit the model"),
        ([{"edit": "attention", "name": "0"}], "does not fit the model"),
        ([{"edit": "externalise", "module": "", "calls": [["relu", 99]]}], "does not fit the model"),
        ([{"edit": "externalise", "module": "nowhere", "calls": [["relu", 0]]}], "does not fit the model"),
        ([{"edit": "slope", "name": "1", "width": 0, "family": "prelu", "target": "one", "channels_first": False,
           "dtype": "float32"}], "does not fit the model"),
        ([{"edit": "weights", "name": "0"}], "edit 0 of the saved model"),
    ],
)  # fmt: skip
def test_hostile_edits_are_refused(record: object, reason: str) -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(0.5), nn.Linear(20, 5))
    with pytest.raises(CheckpointError, match=reason):
        replay(copy.deepcopy(model).to("meta"), record)  # type: ignore[arg-type]
