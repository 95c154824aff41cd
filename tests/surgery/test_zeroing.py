"""Channels set to zero wherever they stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.sites import Site, Slot, Span
from shallower.surgery.zeroing import zero
from tests.followed import Stages, drawn


@given(
    start=st.integers(0, 3), repeats=st.integers(1, 3), apart=st.integers(0, 3), block=st.integers(1, 3),
    width=st.integers(2, 4), data=st.data(),
)  # fmt: skip
def test_zeros_stand_where_the_slot_says(
    start: int, repeats: int, apart: int, block: int, width: int, data: st.DataObject
) -> None:
    stride = width * block + apart
    size = start + repeats * stride + 2
    dropped = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    slot = Slot("weight", (size, 2), 0, (Span(start, repeats, stride, block),), "rows")
    site = Site("site", "stream", width, None, (), None, slots=(slot,))
    model = nn.Linear(2, size)
    nn.init.ones_(model.weight)
    zero(model, sh.Entry.narrow(site, sorted(set(range(width)) - dropped)))
    gone = (model.weight == 0).all(1).nonzero().flatten()
    assert gone.tolist() == slot.positions(torch.tensor(sorted(dropped))).tolist()


@pytest.mark.parametrize("name", ["stem:stream", "down:stream"])
def test_the_output_does_not_depend_on_what_is_zero(name: str) -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    site = find_sites(model, x, kinds="stream")[name]
    entry = sh.Entry.narrow(site, range(3))
    zero(model, entry)
    zeroed = model(x)
    # numbers that only the dropped channels read may be anything
    for slot in site.slots:
        if slot.side == "rows":
            tensor = model.get_parameter(slot.tensor)
            with torch.no_grad():
                tensor.index_fill_(slot.axis, slot.positions(entry.dropped), 7.0)
    torch.testing.assert_close(model(x), zeroed)
