"""How sites are ordered and divided into stages."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from shallower.errors import MethodError
from shallower.methods.collapsing.stages import Stages, check_tolerance

NAMES = ("a", "b", "c", "d", "e")


def costs() -> Mapping[str, float]:
    return {"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0, "e": 5.0}


def never() -> Mapping[str, float]:
    raise AssertionError("measured")


def test_the_cheapest_come_first_by_default() -> None:
    assert Stages().ordered(NAMES, costs) == ["d", "b", "c", "a", "e"]


def test_other_orders_measure_nothing() -> None:
    assert Stages(order="last-first").ordered(NAMES, never) == ["e", "d", "c", "b", "a"]
    assert Stages(order=NAMES).ordered(NAMES, never) == list(NAMES)
    assert Stages().ordered(["a"], never) == ["a"]


def test_sites_go_one_by_one_in_even_parts_or_as_they_are_named() -> None:
    assert Stages().divided(NAMES) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert Stages(2).divided(NAMES) == [["a", "b"], ["c", "d", "e"]]
    assert Stages([["e"], ["a", "b"]]).divided(NAMES) == [["e"], ["a", "b"]]


@pytest.mark.parametrize("groups", [0, 6, [["x"]], [["a"], ["a"]], [["a"], []]])
def test_groups_that_do_not_fit_the_sites_are_refused(groups: object) -> None:
    with pytest.raises(MethodError, match="stages="):
        Stages(groups).divided(NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["random", ["a"], [*NAMES, "f"]])
def test_an_order_that_does_not_fit_the_sites_is_refused(order: object) -> None:
    with pytest.raises(MethodError, match="order="):
        Stages(order=order).ordered(NAMES, costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"tolerance": 0.0}, {"tolerance": float("nan")}, {"arrive": 0.0}, {"arrive": 1.5}])
def test_options_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=next(iter(change))):
        Stages(**change)  # type: ignore[arg-type]


def test_a_number_or_names_alone_are_stages() -> None:
    own = Stages(3, arrive=None)
    assert Stages.of(own) is own
    assert Stages.of(3) == Stages(3)
    assert Stages.of([["a"]]) == Stages([["a"]])
    assert Stages.of(None) == Stages()


def test_a_tolerance_is_a_distance_on_the_way_from_0_to_1() -> None:
    check_tolerance(0.05)
    check_tolerance(1.01)
    for tolerance in (0.0, -0.1, 5.0, float("nan"), float("inf")):
        with pytest.raises(MethodError, match="tolerance="):
            check_tolerance(tolerance)
