"""Widths under a budget, against an exhaustive search."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import TargetError
from shallower.planning.allocation import Choice, allocate, in_proportion

convex = st.builds(
    lambda scale, price: [Choice(w, price * w, scale * (8 - w) ** 2) for w in range(1, 9)],
    st.floats(0.01, 100),
    st.integers(1, 5),
)


@given(menus=st.lists(convex, min_size=1, max_size=3), share=st.floats(0.2, 1.0))
def test_allocation_is_the_best_of_all_up_to_one_channel(menus: list[list[Choice]], share: float) -> None:
    named = {str(i): menu for i, menu in enumerate(menus)}
    limit = share * sum(menu[-1].cost for menu in menus)
    chosen = allocate(named, lambda choices: sum(c.cost for c in choices.values()) <= limit)
    assert sum(c.cost for c in chosen.values()) <= limit
    slack = max(menu[0].cost for menu in menus)
    best = min(
        sum(c.error for c in combination)
        for combination in product(*menus)
        if sum(c.cost for c in combination) <= limit - slack or combination == tuple(m[0] for m in menus)
    )
    assert sum(c.error for c in chosen.values()) <= best * (1 + 1e-9) + 1e-9


def test_sensitive_sites_keep_more() -> None:
    menus = {
        name: [Choice(w, w, weight * (10 - w) ** 2) for w in range(1, 11)] for name, weight in (("a", 1.0), ("b", 9.0))
    }
    chosen = allocate(menus, lambda choices: sum(c.width for c in choices.values()) <= 10)
    assert chosen["a"].width < chosen["b"].width
    assert chosen["a"].width + chosen["b"].width == 10


def test_a_collapse_is_bought_where_it_is_the_better_buy() -> None:
    menu = [Choice(0, 2, 1.0), *(Choice(w, w, 10.0 - w) for w in range(1, 11))]
    chosen = allocate({"a": menu}, lambda choices: choices["a"].cost <= 5)
    assert chosen["a"].width == 0


def test_nothing_is_taken_away_where_the_budget_allows_all() -> None:
    menu = [Choice(w, w, 5.0 - w) for w in range(1, 6)]
    assert allocate({"a": menu}, lambda _: True)["a"].width == 5


def test_an_unreachable_target_is_an_error() -> None:
    with pytest.raises(TargetError, match="cannot be met"):
        allocate({"a": [Choice(1, 1, 0.0)]}, lambda _: False)
    with pytest.raises(TargetError, match="cannot be met"):
        in_proportion({"a": 4}, lambda _: False, {"a": 1})


@pytest.mark.parametrize("round_to", [1, 4])
def test_equal_shares_are_as_large_as_allowed_and_rounded(round_to: int) -> None:
    widths = in_proportion({"a": 32, "b": 64}, lambda w: w["a"] + w["b"] <= 60, {"a": round_to, "b": round_to})
    assert widths == {"a": 20, "b": 40}
    assert all(w % round_to == 0 for w in widths.values())
