"""Numbers of a config are found by what they change in the class that it builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from shallower.saving.stock.solving import Leaf, NumberSearch, Structure, numbers_in, with_numbers


def attention(config: Mapping[str, Any]) -> Structure | None:
    """Two layers with the sizes that a transformer has; heads have to divide the width."""
    width, heads = config["width"], config["heads"]
    if type(width) is not int or type(heads) is not int or width % heads:
        return None
    each = config.get("head_dim") or width // heads
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (50, width)}
    settings: dict[Any, Any] = {}
    for i, inner in enumerate(config["inner"]):
        shapes[f"{i}.attn.q.weight"] = (heads * each, width)
        shapes[f"{i}.mlp.up.weight"] = (int(inner * width), width)
        settings |= {(f"{i}.attn", "head_dim"): each, (f"{i}.attn", "scale"): each**-0.5}
    return Structure(shapes, settings)


CONFIG = {"width": 32, "heads": 4, "head_dim": None, "inner": [2.0, 2.0], "vocab": 50}


def searched(**wanted: Any) -> tuple[dict[Leaf, Any], NumberSearch]:
    """What is found for the structure that these numbers make."""
    made = attention({**CONFIG, **wanted})
    assert made is not None
    search = NumberSearch(CONFIG, attention, made)
    return search.solved(), search


def test_a_number_in_a_list_changes_for_its_layer_alone() -> None:
    found, search = searched(inner=[2.0, 1.0])
    assert found == {("inner", 1): 1.0}
    assert search.whole(found)


def test_a_width_and_what_keeps_the_other_sizes_change_together() -> None:
    found, search = searched(width=16, head_dim=8, inner=[4.0, 4.0])
    assert search.whole(found)
    assert found == {("width",): 16, ("head_dim",): 8, ("inner", 0): 4.0, ("inner", 1): 4.0}


def test_fewer_heads_are_told_from_smaller_ones_though_all_shapes_are_alike() -> None:
    found, search = searched(width=16, heads=2, inner=[4.0, 4.0])
    assert search.whole(found)
    assert not search.unlike(found)
    assert (found["width",], found["heads",]) == (16, 2)


def test_a_number_that_the_config_leaves_open_is_said_where_it_has_to_stay() -> None:
    found, search = searched(heads=2, head_dim=8)
    assert found == {("heads",): 2, ("head_dim",): 8}
    assert search.whole(found)


def test_nothing_is_changed_where_nothing_is_wrong() -> None:
    assert searched()[0] == {}


def test_what_is_said_wrongly_beside_is_taken_back() -> None:
    made = attention({**CONFIG, "inner": [1.0, 1.0]})
    assert made is not None
    shapes = {**made.shapes, "0.attn.q.weight": (13, 32)}
    search = NumberSearch(CONFIG, attention, Structure(shapes, made.settings))
    found = search.said_rightly(search.solved())
    assert found == {("inner", 0): 1.0, ("inner", 1): 1.0}
    assert not search.whole(found)


def test_the_size_of_a_number_decides_nothing() -> None:
    """vocab has the size that is wrong, and nothing answers to it."""
    config = {**CONFIG, "vocab": 64}
    made = attention({**CONFIG, "inner": [1.0, 1.0]})
    assert made is not None
    found = NumberSearch(config, attention, made).solved()
    assert set(found) == {("inner", 0), ("inner", 1)}


def test_numbers_are_found_at_any_depth_but_under_common_keys() -> None:
    config = {"a": {"b": [1, 2.5]}, "c": None, "d": "text", "e": True, "dtype": 3}
    assert numbers_in(config, frozenset({"dtype"})) == {("a", "b", 0): 1, ("a", "b", 1): 2.5, ("c",): None}


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (("a", "b", 1), {"a": {"b": (1, 7)}, "c": 3}),
        (("c",), {"a": {"b": (1, 2)}, "c": 7}),
        (("a", "new"), {"a": {"b": (1, 2), "new": 7}, "c": 3}),
    ],
)
def test_another_number_leaves_the_config_as_it_is(leaf: Leaf, expected: dict[str, Any]) -> None:
    config = {"a": {"b": (1, 2)}, "c": 3}
    made = with_numbers(config, {leaf: 7})
    made["a"]["b"] = tuple(made["a"]["b"])
    assert made == expected
    assert config == {"a": {"b": (1, 2)}, "c": 3}
