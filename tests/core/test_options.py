"""Options that check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from shallower.core.options import Options, choices_of, hints_of, option
from shallower.errors import DataError


@dataclass(frozen=True)
class Some(Options):
    error: ClassVar = DataError

    count: int = option(3, "How many.", least=1, most=9)
    share: float | None = option(None, "What part.", least=0, most=1)
    order: Literal["up", "down"] | None = option("up", "Which way.")
    name: str = option("", "What it is called.")
    loud: bool = option(False, "Whether it is loud.")


def test_what_fits_is_kept() -> None:
    some = Some(count=9, share=0.5, order=None, loud=True)
    assert (some.count, some.share, some.order, some.loud) == (9, 0.5, None, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count=0: at least 1"),
        ({"count": 10}, "count=10: at most 9"),
        ({"count": 1.5}, r"count=1\.5: a whole number"),
        ({"count": True}, "count=True: a whole number"),
        ({"count": "3"}, "a whole number"),
        ({"share": float("nan")}, "share=nan: a finite number"),
        ({"share": 2}, "share=2: at most 1"),
        ({"order": "sideways"}, "choose one of up, down"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Some(**values)


def test_choices_are_read_from_the_hint() -> None:
    assert choices_of(hints_of(Some)["order"]) == ("up", "down")
    assert choices_of(hints_of(Some)["count"]) == ()
