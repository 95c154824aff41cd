"""The search for widths: what is tried alone, and what is chosen between."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import TargetError
from shallower.methods.dropout.searching import WidthSearch, equal_shares, interpolated, largest_shares
from shallower.planning.costs import Cost
from shallower.planning.targets import Target

TABLE = {"a": (2, 4, 6, 8), "b": (1, 2, 3, 4)}


def cost(widths: Mapping[str, int]) -> float:
    return float(widths["a"] + 2 * widths["b"])


def test_every_site_is_tried_alone_below_its_full_width() -> None:
    assert WidthSearch(TABLE, cost).alone(2) == [("a", 2), ("a", 6), ("b", 1), ("b", 3)]
    assert WidthSearch(TABLE, cost).alone(0) == []
    assert WidthSearch({"a": (2, 4)}, cost).alone(3) == []
    assert WidthSearch({"a": (4,), "b": (1, 2)}, cost).alone(3) == [("b", 1)]


def test_the_site_that_loses_nothing_is_narrowed_first() -> None:
    search = WidthSearch(TABLE, cost)

    def scored(widths: Mapping[str, int]) -> float:
        return float(widths["a"])  # b is never missed

    chosen = list(search.between(search.losses(search.alone(3), scored), 5))
    assert [widths["a"] for widths in chosen[:2]] == [8, 8]
    assert all(cost(after) <= cost(before) for before, after in pairwise(chosen))
    assert all(widths[name] in TABLE[name] for widths in chosen for name in TABLE)


def test_equal_shares_go_from_all_to_the_smallest() -> None:
    shares = list(equal_shares(TABLE, 4))
    assert shares[0] == ("full", {"a": 8, "b": 4})
    assert shares[-1] == ("25%", {"a": 2, "b": 1})


@given(losses=st.lists(st.floats(-1, 1), min_size=2, max_size=2), k=st.integers(2, 8))
def test_between_tried_widths_the_loss_lies_between(losses: list[float], k: int) -> None:
    known = {2: losses[0], 5: losses[1], 8: 0.0}
    found = interpolated(range(2, 9), known)
    assert found[2] == max(0.0, losses[0])
    assert found[8] == 0
    assert 0 <= found[k] <= max(0.0, *losses) * (1 + 1e-12)


def counted(widths: Mapping[str, int]) -> Cost:
    return Cost(params=10 * widths["a"] + 10 * widths["b"], macs=1, size=1, kv=widths["b"])


def test_the_same_share_of_every_site_meets_a_target() -> None:
    assert largest_shares(TABLE, Target.parse("params:50%"), counted) == {"a": 4, "b": 2}
    assert largest_shares(TABLE, Target.parse("params:1K"), counted) == {"a": 8, "b": 4}


def test_sites_that_a_target_does_not_count_stay_as_they_are() -> None:
    assert largest_shares(TABLE, Target.parse("kv:50%"), counted) == {"a": 8, "b": 2}


def test_a_target_that_counts_none_of_the_sites_is_told() -> None:
    with pytest.raises(TargetError, match="none of the 1 sites takes anything from it: only attention heads do"):
        largest_shares({"a": (2, 4)}, Target.parse("kv:50%"), lambda widths: Cost(widths["a"], 1, 1, kv=8))
