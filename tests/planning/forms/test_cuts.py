"""What becomes of the tensors of followed sites."""

from __future__ import annotations

import pytest
import torch

import shallower as sh
from shallower.planning.forms.cuts import TensorsLeft
from shallower.sites import LinearMap, Site, Slot, Span


def site(name: str, width: int, *slots: Slot) -> Site:
    return Site(name, "stream", width, None, (), None, slots=slots)


def along(tensor: str, shape: tuple[int, ...], axis: int, start: int = 0, block: int = 1) -> Slot:
    return Slot(tensor, shape, axis, (Span(start, 1, 0, block),), "rows" if axis == 0 else "columns", uses=7)


def test_shapes_and_positions_after_a_cut() -> None:
    entry = sh.Entry.narrow(site("a", 4, along("x.weight", (4, 9), 0), along("y.weight", (5, 8), 1, block=2)), [0, 3])
    rows, columns = TensorsLeft().cut(entry, {}, set())
    assert (rows.before, rows.after, rows.elements) == ((4, 9), (2, 9), (36, 18))
    assert (columns.before, columns.after) == ((5, 8), (5, 4))
    ((axis, kept),) = columns.kept
    assert axis == 1
    assert kept.tolist() == [0, 1, 6, 7]


def test_two_sites_side_by_side_along_one_axis() -> None:
    left = TensorsLeft()
    first = sh.Entry.narrow(site("a", 4, along("x.weight", (5, 10), 1)), [1, 2])
    second = sh.Entry.narrow(site("b", 6, along("x.weight", (5, 10), 1, start=4)), [0, 5])
    (one,) = left.cut(first, {}, set())
    (two,) = left.cut(second, {}, set())
    assert (one.after, two.before, two.after) == ((5, 8), (5, 8), (5, 4))
    assert one.kept[0][1].tolist() == [1, 2, 4, 5, 6, 7, 8, 9]
    # of what the first leaves: its two channels, then the first and the last of the second's
    assert two.kept[0][1].tolist() == [0, 1, 2, 7]


def test_both_axes_of_one_tensor() -> None:
    left = TensorsLeft()
    rows = sh.Entry.narrow(site("a", 4, along("x.weight", (4, 6), 0)), [0])
    columns = sh.Entry.narrow(site("b", 6, along("x.weight", (4, 6), 1)), [1, 4])
    assert left.cut(rows, {}, set())[0].after == (1, 6)
    assert left.cut(columns, {}, set())[0].after == (1, 2)


def test_a_bias_that_an_earlier_entry_gave_is_cut_with_its_rows() -> None:
    entry = sh.Entry.narrow(site("a", 4, along("x.weight", (4, 9), 0)), [0, 3])
    now = LinearMap("x", "linear", 6, 4, True, 3)
    weight, bias = TensorsLeft().cut(entry, {"x": now}, set())
    assert (weight.before, weight.after) == ((4, 6), (2, 6))
    assert (bias.tensor, bias.before, bias.after) == ("x.bias", (4,), (2,))


def test_what_has_gone_cannot_be_cut() -> None:
    entry = sh.Entry.narrow(site("a", 4, along("x.weight", (4, 9), 0)), [0, 3])
    with pytest.raises(sh.PlanError, match="goes with another entry"):
        TensorsLeft().cut(entry, {}, {"x"})


def test_costs_of_a_plan_of_followed_sites() -> None:
    entry = sh.Entry.narrow(site("a", 4, along("x.weight", (4, 9), 0)), [0])
    plan = sh.Plan((entry,))
    assert (plan.params_saved, plan.macs_saved) == (27, 27 * 7)
    assert plan.steps[0].form.kind == "cut"
    assert "cut" in str(plan)


def test_positions_outside_are_refused() -> None:
    with pytest.raises(sh.PlanError, match="do not lie in"):
        sh.Plan((sh.Entry.narrow(site("a", 4, along("x.weight", (3, 9), 0)), torch.tensor([0])),))
