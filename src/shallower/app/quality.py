"""How a score is said to people: a score is better when it is higher, and an accuracy is read in percent.

shown("accuracy", 0.934)        # "93.40 %"
shown("perplexity", -2.0)       # "7.389": the score is minus the logarithm
"""

from __future__ import annotations

import math

PERCENT = ("accuracy", "agreement")
"""Qualities that are a fraction of all rows."""

_GREATEST_LOSS = 700.0
"""Above this exponent a float overflows."""


def number(quality: str, score: float) -> float:
    """The score on the scale that people read: percent, or a perplexity."""
    if quality == "perplexity":
        return math.exp(min(-score, _GREATEST_LOSS))
    if quality in PERCENT:
        return score * 100
    return score


def shown(quality: str, score: float) -> str:
    """The score as people read it."""
    if quality == "perplexity":
        return f"{number(quality, score):.4g}"
    if quality in PERCENT:
        return f"{number(quality, score):.2f} %"
    return f"{score:.4f}"


def difference(quality: str, before: float, after: float) -> str:
    """How a score changed, as people read it: "-2.00 points"."""
    change = number(quality, after) - number(quality, before)
    if quality == "perplexity":
        return f"{change:+.3g}"
    if quality in PERCENT:
        return f"{change:+.2f} points"
    return f"{change:+.4f}"


def rows_of(quality: str) -> str:
    """What is counted of the data: a language model reads its texts in blocks of equal length."""
    if quality == "perplexity":
        return "blocks of text"
    return "rows"


def lower_is_better(quality: str) -> bool:
    """Whether people read a smaller number as the better one."""
    return quality == "perplexity"


def seconds(value: float) -> str:
    """A time for people: "0.52 ms", "12.5 ms", "1.24 s"."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s"
