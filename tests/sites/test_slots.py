"""Where channels stand along an axis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower.sites import Slot, Span


def slot(size: int, *spans: Span) -> Slot:
    return Slot("layer.weight", (size, 3), 0, spans)


@pytest.mark.parametrize(
    ("span", "channels", "positions"),
    [
        (Span(0, 1, 0, 1), [0, 2], [0, 2]),
        (Span(4, 1, 0, 1), [0, 2], [4, 6]),
        (Span(0, 1, 0, 3), [1], [3, 4, 5]),
        (Span(0, 2, 6, 1), [1], [1, 7]),
        (Span(1, 2, 8, 2), [0, 2], [1, 2, 5, 6, 9, 10, 13, 14]),
    ],
)
def test_positions(span: Span, channels: list[int], positions: list[int]) -> None:
    assert slot(20, span).positions(torch.tensor(channels)).tolist() == positions


def test_positions_of_several_spans_are_in_order() -> None:
    two = slot(8, Span(4, 1, 0, 1), Span(0, 1, 0, 1))
    assert two.positions(torch.tensor([1, 3])).tolist() == [1, 3, 5, 7]


def test_names() -> None:
    assert (slot(2).module, slot(2).attribute) == ("layer", "weight")
    assert (Slot("scale", (2,), 0, ()).module, Slot("scale", (2,), 0, ()).attribute) == ("", "scale")


@given(
    start=st.integers(0, 6), repeats=st.integers(1, 3), stride=st.integers(0, 12), block=st.integers(1, 3),
    width=st.integers(1, 4), size=st.integers(1, 30),
)  # fmt: skip
def test_what_holds_has_each_position_once(
    start: int, repeats: int, stride: int, block: int, width: int, size: int
) -> None:
    one = slot(size, Span(start, repeats, stride, block))
    found = one.positions(torch.arange(width))
    fits = len(found.unique()) == len(found) and int(found.max()) < size
    if one.holds(width):
        assert fits
    elif repeats == 1:
        assert not fits


@pytest.mark.parametrize("broken", [Slot("w", (4,), 1, (Span(0, 1, 0, 1),)), Slot("w", (4,), 0, ())])
def test_what_holds_nothing(broken: Slot) -> None:
    assert not broken.holds(2)
