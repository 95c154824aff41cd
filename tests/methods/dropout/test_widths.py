"""The grid of widths, and how widths are drawn, chosen and named."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.methods.dropout.widths import (
    at_most,
    checked,
    drawn,
    full,
    named_widths,
    nearest,
    share_of,
    smallest,
    summary,
    table_of,
)
from shallower.sites import Sites


def sites() -> Sites:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 2))
    return find_sites(model, torch.randn(2, 4))


def test_a_table_goes_from_the_bound_to_the_full_width() -> None:
    assert table_of(sites(), "50%", 4) == {"0": (8, 12, 16), "2": (12, 16, 20, 24)}
    assert table_of(sites(), 16, 1) == {"0": (16,), "2": tuple(range(16, 25))}


@pytest.mark.parametrize("bound", [0, 17, -1, True, 1.5, "0%", "101%", "x", "nan%"])
def test_what_is_no_width_is_refused(bound: object) -> None:
    with pytest.raises(MethodError):
        table_of(sites(), bound, 1)  # type: ignore[arg-type]


@given(seed=st.integers(0, 1000), p=st.sampled_from([0.0, 0.5, 1.0]), shared=st.sampled_from([0.0, 1.0]))
def test_widths_are_drawn_from_the_table(seed: int, p: float, shared: float) -> None:
    table = {"a": (2, 4, 6, 8), "b": (1, 2, 3, 4), "c": (5,)}
    widths = drawn(table, p, shared, torch.Generator().manual_seed(seed))
    assert all(widths[name] in table[name] for name in table)
    if p == 0:
        assert widths == full(table)
    if p == 1:
        assert widths["a"] < 8
        assert widths["b"] < 4
    if p == 1 and shared == 1:
        assert widths["a"] == 2 * widths["b"]


@given(text=st.text(max_size=6))
def test_any_text_is_a_share_or_refused(text: str) -> None:
    with suppress(MethodError):
        assert 0 < share_of(text) <= 1


def test_choices_from_a_row_of_widths() -> None:
    assert nearest((4, 8, 16), 0.4) == 8
    assert nearest((4, 8, 16), 0.375) == 4
    assert (at_most((4, 8, 16), 9), at_most((4, 8, 16), 1)) == (8, 4)
    assert smallest({"a": (2, 4)}) == {"a": 2}


def test_a_width_is_a_number_of_channels() -> None:
    site = sites()[0]
    assert checked(site, 16) == 16
    for width in (0, 17, True, 2.0):
        with pytest.raises(MethodError, match="from 1 to 16"):
            checked(site, width)  # type: ignore[arg-type]


def test_widths_are_named_for_people() -> None:
    assert summary((2, 4, 8)) == "3 widths from 2 to 8"
    assert summary(None) == "no such site"
    assert named_widths({"a": 1, "b": 2}) == "a: 1, b: 2"
    assert "and 2 more" in named_widths({str(i): i for i in range(6)})
