"""Tables, lists and amounts for people."""

from __future__ import annotations

import pytest

from shallower.core.text import amount, common_prefix, listing, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (940, "940"),
        (1000, "1K"),
        (33_612_000, "33.6M"),
        (999_950, "1M"),
        (1_204_000_000, "1.2G"),
        (7e12, "7T"),
        (999_600_000_000_000, "1000T"),
    ],
)
def test_amounts_have_three_digits(count: float, text: str) -> None:
    assert amount(count) == text


@pytest.mark.parametrize(
    ("names", "text"), [([], "none"), (["a", "b"], "a, b"), (iter("abc"), "a, b, c"), ("abcde", "a, b, c and 2 more")]
)
def test_long_lists_are_cut(names: str, text: str) -> None:
    assert listing(names, most=3) == text


def test_columns_are_aligned() -> None:
    assert table(("name", "n"), [("a", "10"), ("long", "9")], right=[1]) == "name   n\na     10\nlong   9"


def test_names_have_their_leading_parts_in_common_but_never_the_last() -> None:
    assert common_prefix(["a.b.c", "a.b.d.e"]) == "a.b"
    assert common_prefix(["a.b", "a.b"]) == "a"
