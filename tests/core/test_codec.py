"""Dataclasses are written and read back, and nothing else than them is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shallower.core.codec import Bounds, decode, encode, field_names, known_fields
from shallower.errors import CheckpointError, PlanError

Name = Annotated[str, Bounds(1, 8)]


@dataclass(frozen=True)
class Circle:
    radius: float
    shape: Literal["circle"] = field(default="circle", init=False)


@dataclass(frozen=True)
class Square:
    side: Annotated[int, Bounds(0, 100)]
    names: tuple[Name, ...] = ()
    shape: Literal["square"] = field(default="square", init=False)

    def __post_init__(self) -> None:
        if self.side == 13:
            raise PlanError("13 is unlucky")


@dataclass(frozen=True)
class Drawing:
    title: str
    shapes: tuple[Circle | Square, ...]
    by_name: Mapping[Name, Circle | None]
    size: tuple[int, float] = (1, 2.0)
    kind: Literal["a", 1, True] | None = None
    extra: Any = None
    number: int | str = 0
    cached: int = field(default=7, init=False)


SHAPES = st.one_of(
    st.builds(Circle, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Square, st.integers(0, 12), st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)),
)
DRAWINGS = st.builds(
    Drawing,
    st.text(),
    st.lists(SHAPES, max_size=3).map(tuple),
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.one_of(st.none(), SHAPES.filter(lambda s: isinstance(s, Circle)))
    ),
    st.tuples(st.integers(-(1 << 53), 1 << 53), st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from([None, "a", 1, True]),
    st.recursive(st.one_of(st.none(), st.integers()), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
    st.one_of(st.integers(-9, 9), st.text()),
)


@given(DRAWINGS)
def test_what_is_written_is_read_back(drawing: Drawing) -> None:
    data = json.loads(json.dumps(encode(drawing)))
    assert "cached" not in data
    assert decode(Drawing, data, at="x", error=CheckpointError) == drawing


def test_what_tells_the_kind_comes_first() -> None:
    assert list(encode(Circle(2.0))) == ["shape", "radius"]


PLAIN = {"title": "t", "shapes": [{"shape": "square", "side": 3}], "by_name": {"a": {"shape": "circle", "radius": 1}}}


def test_fields_with_a_default_may_be_missing() -> None:
    assert decode(Drawing, PLAIN, at="x", error=CheckpointError) == Drawing("t", (Square(3),), {"a": Circle(1.0)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"title": 3}, "x.title: 3 is not a text"),
        ({"title": None}, "x.title: None is not a text"),
        ({"shapes": {}}, "x.shapes: the object is not a list"),
        ({"shapes": [{}]}, r"x.shapes\[0\]: the object is not shape 'circle' or shape 'square'"),
        ({"shapes": [{"shape": "oval", "radius": 1}]}, r"x.shapes\[0\]: the object is not shape 'circle'"),
        ({"shapes": [{"shape": "square"}]}, r"x.shapes\[0\]: the object is not complete: `side` is missing"),
        ({"shapes": [{"shape": "square", "side": 13}]}, r"the object is not a Square: 13 is unlucky"),
        ({"shapes": [{"shape": "square", "side": 101}]}, r"side: 101 is not a number from 0 to 100"),
        ({"shapes": [{"shape": "square", "side": True}]}, r"side: True is not a whole number"),
        ({"shapes": [{"shape": "square", "side": 3.0}]}, r"side: 3.0 is not a whole number"),
        ({"shapes": [{"shape": "square", "side": 3, "names": [""]}]}, r"names\[0\]: '' is not of length from 1 to 8"),
        ({"shapes": [{"shape": "circle", "radius": float("inf")}]}, r"radius: inf is not a finite number"),
        ({"shapes": [{"shape": "circle", "radius": 10**400}]}, r"'a number of 1329 bits' is not a finite"),
        ({"shapes": [{"shape": "circle", "radius": 1, "colour": 2}]}, "'colour' is not a key of Circle"),
        ({"by_name": {"a" * 9: None}}, "the key: 'aaaaaaaaa' is not of length"),
        ({"by_name": []}, "x.by_name: a list of 0 is not an object"),
        ({"size": [1]}, "x.size: a list of 1 is not a list of 2"),
        ({"size": [1 << 54, 1]}, r"x.size\[0\]: 'a number of 55 bits' is not a whole number"),
        ({"kind": False}, "x.kind: False is not one of 'a', 1, True"),
        ({"number": None}, "x.number: None is not any of the kinds"),
        ({"cached": 7}, "'cached' is not a key of Drawing"),
    ],
)
def test_what_is_of_another_type_is_an_error_that_says_where(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        decode(Drawing, PLAIN | change, at="x", error=CheckpointError)


@pytest.mark.parametrize("data", [None, [], 3, "text", {}])
def test_what_is_no_dataclass_is_an_error(data: Any) -> None:
    with pytest.raises(CheckpointError, match="x: "):
        decode(Drawing, data, at="x", error=CheckpointError)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["title", "shapes", "by_name", "shape", "side", "radius"]), inner, max_size=4),
    ),
    max_leaves=10,
)


@given(JSON)
def test_anything_is_read_or_refused(data: Any) -> None:
    with suppress(CheckpointError):
        assert isinstance(decode(Drawing, data, at="x", error=CheckpointError), Drawing)


@dataclass(frozen=True, eq=False)
class Fit:
    maps: tuple[Tensor, ...]
    bias: Tensor | None = None


def test_types_of_ones_own_are_written_and_read_by_functions() -> None:
    tensors: dict[str, Tensor] = {}

    def write(tensor: Tensor, at: str) -> str:
        tensors[at] = tensor
        return at

    data = encode(Fit((torch.ones(2), torch.zeros(1))), special={Tensor: write}, at="3")
    assert data == {"maps": ["3.maps.0", "3.maps.1"], "bias": None}
    fit = decode(Fit, data, at="x", error=PlanError, special={Tensor: lambda name, _: tensors[name]})
    assert [t.tolist() for t in fit.maps] == [[1, 1], [0]]


def test_fields_of_another_version_are_taken_by_their_names_of_today() -> None:
    data = {"radius": 2.0, "name": "a", "breadth": 3, "side": None}
    assert known_fields(Circle, data, {}) == {"radius": 2.0}
    assert known_fields(Square, data, {"breadth": "side"}) == {"side": 3}
    assert field_names(Square) == {"side", "names", "shape"}
