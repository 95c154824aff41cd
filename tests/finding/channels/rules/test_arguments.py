"""Arguments of calls by name and by place."""

import pytest
import torch
from torch import nn

from shallower.finding.channels.following import UnknownUseError
from shallower.finding.channels.rules.arguments import (
    dimensions,
    given,
    integer,
    integers,
    of_axis,
    optional,
    tensor,
    values,
)
from shallower.recording.tracing import trace_forward


def call_of(function):
    """The last call of a function of one tensor."""

    class Net(nn.Linear):
        def forward(self, x):
            return function(x)

    return trace_forward(Net(1, 1), (torch.rand(2, 3, 4),)).calls[-1]


def test_by_place_and_by_name():
    for call in (call_of(lambda x: x.narrow(1, 0, 2)), call_of(lambda x: torch.narrow(x, dim=1, start=0, length=2))):
        assert [integer(call, 1, "dim"), given(call, 3, "length")] == [1, 2]
        assert tensor(call, 0, "input").shape == (2, 3, 4)
        assert optional(call, 5, "weight") is None


def test_a_default_stands_for_what_is_left_out():
    call = call_of(lambda x: x.softmax(-1))
    assert integer(call, 5, "dtype", 7) == 7
    with pytest.raises(UnknownUseError):
        integer(call, 5, "dtype")
    with pytest.raises(UnknownUseError):
        tensor(call, 1, "dim")


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        (lambda x: x.sum(), [0, 1, 2]),
        (lambda x: x.sum(-1), [2]),
        (lambda x: x.sum(1, True), [1]),
        (lambda x: x.mean((0, 2)), [0, 2]),
        (lambda x: x.sum(dim=[1]), [1]),
        (lambda x: x.permute(2, 0, 1), [2, 0, 1]),
        (lambda x: x.std(False), [0, 1, 2]),
        (lambda x: torch.sum(x, axis=1), [1]),
    ],
)
def test_dimensions(function, dims):
    assert dimensions(call_of(function), 3) == dims


def test_once_for_all_axes_or_for_each():
    assert [
        of_axis(2, 1, 0),
        of_axis((2, 3), 1, 0),
        of_axis((2,), 1, 0),
        of_axis(None, 1, 5),
        of_axis("same", 1, 0),
    ] == [
        2,
        3,
        2,
        5,
        0,
    ]


def test_whole_numbers_only():
    assert integers(3) == [3]
    assert integers((1, 2)) == [1, 2]
    for wrong in (None, True, 1.0, ["x"]):
        with pytest.raises(UnknownUseError):
            integers(wrong)


def test_several_tensors():
    assert len(values(call_of(lambda x: torch.cat([x, x])), 0, "tensors")) == 2
    assert len(values(call_of(lambda x: torch.cat(tensors=(x, x, x))), 0, "tensors")) == 3
    with pytest.raises(UnknownUseError):
        values(call_of(lambda x: x.sum(1)), 1, "tensors")
