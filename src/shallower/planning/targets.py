"""What a target asks for, and the smallest choice that meets it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from shallower.errors import TargetError
from shallower.planning.costs import Cost

Unit = Literal["params", "macs", "size", "kv", "latency", "drop"]
Amount = Literal["share", "factor", "absolute"]
T = TypeVar("T")

_EARLIER_UNITS = {"memory": "size"}
"""Units by the names that they had in earlier versions."""

_BYTES = ("size", "kv")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|x|[KMGT]i?B?|B|us|ms|s)?", re.IGNORECASE)
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_SECONDS_IN = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLES = "params:50%, params:7B, macs:60%, size:40MB, kv:50%, latency:1.5x, drop:1%"


@dataclass(frozen=True)
class Target:
    """How small, how fast or how good the result has to be.

        sh.Target.parse("macs:60%").limit(before)      # MACs that may remain
        sh.Target.parse("latency:1.5x")                # one and a half times as fast
        sh.Target.parse("drop:1%").floor(0.92)         # the lowest score allowed: 0.9108

    Attributes:
        unit: what is counted. `drop` limits the loss of score, all others the cost of the whole model.
        form: "share", the part that remains (of `drop`: the part of the score that may be lost); "factor", how many
            times cheaper; "absolute", the amount that may remain (of `drop`: that may be lost).
        value: the number: 0.6 for 60 %, 1.5 for 1.5x.
    """

    unit: Unit
    form: Amount
    value: float

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Read `unit:amount`; a target stays what it is.

            sh.Target.parse("size:40MB")

        The units params, macs, size, kv and latency take a share (60%), a factor (1.5x) or an absolute amount (10M,
        7B, 40MB, 3ms) that may remain; drop takes 1% of the score or 0.5 of its own unit.

        Raises:
            TargetError: the text is none of these, or asks for nothing (100 %, 1x) or for the impossible (0 %).
        """
        if isinstance(text, Target):
            return text
        if not isinstance(text, str):
            raise TargetError(f"a target is text, for example {_EXAMPLES}; not {type(text).__name__}")
        name, separator, amount = text.strip().partition(":")
        name = name.strip().lower()
        unit = next((unit for unit in get_args(Unit) if unit == _EARLIER_UNITS.get(name, name)), None)
        if not separator or unit is None:
            raise TargetError(f"the target {text!r} is not of the form UNIT:AMOUNT; for example {_EXAMPLES}")
        match = _NUMBER.fullmatch(amount.strip())
        if match is None:
            raise TargetError(f"the amount {amount!r} of the target {text!r} is not a number; for example {_EXAMPLES}")
        form, value = _amount(text, unit, float(match[1]), (match[2] or "").lower())
        _check(text, unit, form, value)
        return cls(unit, form, value)

    def __str__(self) -> str:
        if self.form == "share":
            return f"{self.unit}:{self.value * 100:.12g}%"
        suffix = ""
        if self.form == "factor":
            suffix = "x"
        elif self.unit == "latency":
            suffix = "s"
        return f"{self.unit}:{self.value:.12g}{suffix}"

    def amount_of(self, cost: Cost) -> float:
        """What of `cost` this target limits.

        Raises:
            TargetError: the target limits the score, or a latency or a KV cache that was not counted.
        """
        if self.unit == "drop":
            raise TargetError(f"the target {self} limits the score, not a cost")
        found: float | None = getattr(cost, self.unit)
        if found is None:
            what = "a model that returns its KV cache"
            if self.unit == "latency":
                what = "a measured latency"
            raise TargetError(f"the target {self} needs {what}")
        return found

    def limit(self, before: Cost) -> float:
        """How much may remain of a model that costs `before`."""
        amount = self.amount_of(before)
        if self.form == "share":
            return amount * self.value
        if self.form == "factor":
            return amount / self.value
        return self.value

    def met(self, before: Cost, after: Cost) -> bool:
        """Whether a model that costs `after` is small enough, where the original costs `before`."""
        return self.amount_of(after) <= self.limit(before)

    def floor(self, score: float) -> float:
        """The lowest score allowed by a `drop` target, where the original scores `score` (higher is better)."""
        if self.unit != "drop":
            raise TargetError(f"the target {self} limits a cost, not the score")
        if self.form == "share":
            return score - abs(score) * self.value
        return score - self.value


def _amount(text: str, unit: Unit, number: float, suffix: str) -> tuple[Amount, float]:
    """What a number with its suffix stands for."""
    if suffix == "%":
        return "share", number / 100
    if suffix == "x":
        return "factor", number
    if suffix in _SECONDS_IN:
        if unit != "latency":
            raise TargetError(f"the target {text!r} counts {unit}, which is not measured in seconds")
        return "absolute", number * _SECONDS_IN[suffix]
    if unit == "latency":
        raise TargetError(f"the target {text!r} needs a unit of time (ms), a factor (1.5x) or a share (60%)")
    if unit == "drop" and suffix:
        raise TargetError(f"the target {text!r} must be the loss of score allowed, for example drop:1% or drop:0.5")
    return "absolute", number * _scale(text, unit, suffix)


def _scale(text: str, unit: Unit, suffix: str) -> float:
    """10M, 7B (billions) of params and MACs; 40MB, 40MiB, 512B of bytes."""
    if unit not in _BYTES:
        if len(suffix) > 1:
            raise TargetError(f"the target {text!r} counts {unit}, which is not measured in bytes")
        return _COUNTS[suffix]
    letter = suffix.removesuffix("b")
    if letter.endswith("i"):
        return float(1024 ** ("kmgt".index(letter[0]) + 1))
    return _COUNTS[letter]


def _check(text: str, unit: Unit, form: Amount, value: float) -> None:
    """Refuse a target that asks for nothing, or for the impossible."""
    if unit == "drop":
        if form == "factor" or (form == "share" and value >= 1):
            raise TargetError(f"the target {text!r} must be the loss of score allowed, for example drop:1% or drop:0.5")
        return
    if form == "share" and not 0 < value < 1:
        raise TargetError(f"the target {text!r} must leave more than 0 % and less than 100 % of the model")
    if form == "factor" and value <= 1:
        raise TargetError(f"the target {text!r} must be a factor above 1x: how many times cheaper the result is")
    if form == "absolute" and (value <= 0 or (unit != "latency" and value < 1)):
        raise TargetError(
            f"the target {text!r} must leave at least 1 of {unit}. A share is written with %: {unit}:{value * 100:g}%"
        )


def shortest_prefix(
    order: Sequence[T], target: Target, before: Cost, cost_of: Callable[[Sequence[T]], Cost]
) -> Sequence[T]:
    """The first k of `order`, with the smallest k >= 1 that meets a target of cost.

    Args:
        order: what may be taken, cheapest in quality first.
        target: a target of cost (not `drop`).
        before: what the model costs now.
        cost_of: what it costs after taking these; with more of them it must not rise. It is asked about log2(n) times.

    Raises:
        TargetError: all of them together do not meet the target; the error says how far they get.
    """
    limit, start = target.limit(before), target.amount_of(before)

    def amount_after(k: int) -> float:
        return target.amount_of(cost_of(order[:k]))

    reached = "nothing, since there is no site"
    if order:
        least = amount_after(len(order))
        if least <= limit:
            k = bisect_left(range(1, len(order)), True, key=lambda k: amount_after(k) <= limit)
            return order[: k + 1]
        reached = f"{least / start:.1%} of the original"
    raise TargetError(
        f"the target {target} asks for {limit / start:.1%} of the model's {target.unit}; "
        f"all {len(order)} sites together reach {reached}. Ask for less, or allow more sites"
    )
