"""When a result is so bad that nobody should use it unwarned.

    alarm_of("accuracy", dense=0.91, small=0.55, chance=0.51)
    # "the accuracy fell from 91.00 % to 55.00 %: more than a third of what ... is lost"

What counts as far below: more than a third of what the original has above chance is lost, or the perplexity doubled.
"""

from __future__ import annotations

import math

from shallower.app import quality as qualities

MOST_LOST = 1 / 3
"""Of what the original has above chance."""
MOST_TIMES = 2.0
"""As large as the original's a perplexity may be."""


def alarm_of(quality: str, dense: float, small: float, chance: float = 0.0) -> str:
    """What is wrong with a result of that score, or "".

    Args:
        quality: what the score is.
        dense, small: scores of the original and of the result, higher is better.
        chance: the score that knowing nothing of the inputs gives.
    """
    before, after = qualities.shown(quality, dense), qualities.shown(quality, small)
    fell = f"the {quality} fell from {before} to {after}"
    if math.isnan(small):
        return f"the {quality} of the result is not a number"
    if quality == "perplexity":
        if small < dense - math.log(MOST_TIMES):
            return f"the perplexity rose from {before} to {after}, more than {MOST_TIMES:g} times the original's"
        return ""
    if dense <= chance:
        return ""
    if small <= chance:
        return f"{fell}, no better than chance ({qualities.shown(quality, chance)})"
    if dense - small <= MOST_LOST * (dense - chance):
        return ""
    above = ""
    if chance > 0:
        above = f" above chance ({qualities.shown(quality, chance)})"
    return f"{fell}: more than a third of what the original has{above} is lost"


def dense_alarm_of(quality: str, dense: float, chance: float) -> str:
    """A word on an original that is no better than chance: data and model hardly belong together; else ""."""
    if quality != "accuracy" or dense > chance + 0.02:
        return ""
    return (
        f"the unchanged model is no better than chance on these rows ({qualities.shown(quality, dense)}, chance is "
        f"{qualities.shown(quality, chance)}): do the labels number the classes as the model does?"
    )
