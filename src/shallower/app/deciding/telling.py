"""The paragraph at the end of a compression: what was done, what it cost, and what more time would bring."""

from __future__ import annotations

import math

from shallower.app import quality as qualities
from shallower.app.deciding.clock import spoken
from shallower.app.results import Verdict
from shallower.training import History

_STILL = 0.02
"""Part of what remains of the divergence that a look at the rows held out has to take away, to be worth more time."""
FASTER = 1.005
"""Below this speed-up a model is no faster."""


def cost_sentence(verdict: Verdict, quality: str, rows: str) -> str:
    """What the smaller model is and what it costs, in a sentence.

    cost_sentence(verdict, "accuracy", "436 test rows")
    """
    dense, small = verdict.dense, verdict.small
    before, after = qualities.shown(quality, dense.score), qualities.shown(quality, small.score)
    change = qualities.difference(quality, dense.score, small.score)
    scored = f"{quality} on {rows} is {after}, was {before} ({change})"
    if quality in ("agreement", "cosine"):
        scored = f"{quality} with the original on {rows} is {after}"
    params, macs = small.params / max(1, dense.params), small.macs / max(1, dense.macs)
    sizes = f"{params:.0%} of the parameters and {macs:.0%} of the MACs"
    return f"The result has {sizes}{speed(verdict)}; {scored}."


def speed(verdict: Verdict) -> str:
    """How fast the smaller model is, after a comma; nothing where it was not measured."""
    if math.isnan(verdict.speedup):
        return ""
    if verdict.is_noise:
        return ", and is not faster beyond the noise"
    if verdict.speedup < FASTER:
        return ", and is no faster"
    spread = verdict.speedup**2 * verdict.spread / 2
    return f", and is {verdict.speedup:.2f} ± {spread:.2f} times as fast"


def still_falling(scores: list[float]) -> float:
    """The part of the divergence that the last look at the rows held out found gone; 0 where it no longer falls.

    Args:
        scores: minus the divergence, in the order of the looks, the one before the training first.
    """
    known = [-score for score in scores if not math.isnan(score)]
    if len(known) < 2 or known[-2] <= 0:
        return 0.0
    share = 1 - known[-1] / known[-2]
    if share < _STILL:
        return 0.0
    return share


def outlook(history: History | None, seconds: float) -> str:
    """What more time would bring, in a sentence.

    Args:
        history: of the healing; None where there was none.
        seconds: that there were for everything.
    """
    if history is None:
        return f"There was no time to heal: with more than {spoken(seconds)} distillation would win some of it back."
    before = [] if history.before is None else [history.before]
    share = still_falling([*before, *history.scores])
    if history.stopped:
        return "Rows held out gained no more: more minutes would bring little, a larger target or other rows would."
    if share:
        return f"The divergence was still falling, by {share:.0%} in the last round: more minutes would bring more."
    return "The divergence hardly fell any more: more minutes would bring little."
