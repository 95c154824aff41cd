"""What a form says of the maps that remain."""

from __future__ import annotations

from shallower.planning.forms import Form, totals
from shallower.sites import LinearMap

UP, DOWN = LinearMap("up", "linear", 4, 8, True, 10), LinearMap("down", "linear", 8, 4, False, 10)


def test_a_forms_costs_are_those_of_its_maps_norms_slopes_and_products() -> None:
    form = Form("narrower", UP, None, (DOWN,), (200, 2000), kept=8, slopes=8, norms=16, activation=1, products=5)
    assert form.params == UP.params + DOWN.params + 8 + 16 + 1
    assert form.macs == UP.macs + DOWN.macs + 5
    assert form.cheaper


def test_an_activation_that_goes_is_an_operation_less_at_the_same_cost() -> None:
    assert Form("removed", None, None, (), (0, 0)).cheaper
    same = Form("narrower", UP, None, (DOWN,), (UP.params + DOWN.params, UP.macs + DOWN.macs))
    assert not same.cheaper


def test_costs_of_several_forms_add_up() -> None:
    forms = [Form("narrower", UP, None, (), (100, 1000)), Form("narrower", DOWN, None, (), (50, 500), norms=6)]
    assert totals(forms) == ((150, 1500), (UP.params + DOWN.params + 6, UP.macs + DOWN.macs))
    assert totals([]) == ((0, 0), (0, 0))
