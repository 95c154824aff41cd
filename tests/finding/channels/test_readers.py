"""The layers that read channels alone and can be fitted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.finding.channels.readers import plain_readers
from shallower.sites import Slot, Span

MODEL = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(12, 2, bias=False), "c": nn.Conv2d(6, 2, 1)})
CALLED = {"a": 1, "b": 1, "c": 1}


def columns(name: str, *spans: Span) -> Slot:
    weight = MODEL[name].weight
    assert isinstance(weight, torch.Tensor)
    return Slot(f"{name}.weight", tuple(weight.shape), 1, spans, "columns", uses=7)


def test_layers_all_of_whose_columns_the_channels_are() -> None:
    made = Slot("elsewhere.weight", (6, 3), 0, (Span(0, 1, 0, 2),), "rows")
    (m,) = plain_readers(MODEL, [made, columns("a", Span(0, 1, 0, 2))], 3, CALLED)
    assert (m.name, m.kind, m.d_in, m.d_out, m.bias, m.positions) == ("a", "linear", 6, 4, True, 7)
    (m,) = plain_readers(MODEL, [columns("b", Span(0, 1, 0, 4))], 3, CALLED)
    assert (m.d_in, m.bias) == (12, False)


@pytest.mark.parametrize(
    "slots",
    [
        [columns("a", Span(2, 1, 0, 1))],
        [columns("b", Span(0, 2, 6, 2))],
        [columns("c", Span(0, 1, 0, 2))],
        [columns("a", Span(0, 1, 0, 2)), columns("b", Span(0, 1, 0, 4))],
        [],
    ],
    ids=["a part of the columns", "twice", "a convolution", "different blocks", "nothing"],
)
def test_others_are_none(slots: list[Slot]) -> None:
    assert plain_readers(MODEL, slots, 3, CALLED) == ()


def test_a_layer_whose_weight_is_read_without_calling_it_is_none() -> None:
    assert plain_readers(MODEL, [columns("a", Span(0, 1, 0, 2))], 3, {"b": 1}) == ()


@pytest.mark.parametrize("how", ["hook", "forward", "subclass"])
def test_layers_that_do_more_are_none(how: str) -> None:
    class Noisy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    layer = Noisy(6, 4) if how == "subclass" else nn.Linear(6, 4)
    if how == "hook":
        layer.register_forward_hook(lambda *_: None)
    if how == "forward":
        layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
    slot = Slot("x.weight", (4, 6), 1, (Span(0, 1, 0, 2),), "columns")
    assert plain_readers(nn.ModuleDict({"x": layer}), [slot], 3, {"x": 1}) == ()
