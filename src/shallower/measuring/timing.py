"""Which of several models is faster, told with the noise: models take turns, and ratios come with an interval.

    times = times_in_turn({"before": before, "after": after}, inputs)
    ratio = Ratio.of(times["after"], times["before"])
    ratio.is_faster                     # by more than chance
    print(ratio)                        # 0.82 (0.80-0.83)

On a machine that has other work to do the least of a few passes is close to what a model needs, and what then still
differs from one few to the next is the noise. So passes come in blocks, each block gives its least time, and a ratio
is the median over the blocks.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import timer

from shallower.core.failures import failing
from shallower.core.inputs import Inputs, bare_call, call
from shallower.core.modes import unchanged
from shallower.errors import ForwardError, ShallowerError


@dataclass(frozen=True)
class Ratio:
    """A time as part of another one.

    Attributes:
        median: of the ratios within the blocks.
        low, high: the interval between two of the ratios that holds the true median with at least 95 % confidence
            (sign test); all of the ratios' range where there are fewer than six blocks.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> Ratio:
        """Of the times of two models, block by block.

        Raises:
            ShallowerError: there are none, or not as many of one as of the other.
        """
        if not times or len(times) != len(others):
            raise ShallowerError(f"{len(times)} and {len(others)} times: a ratio needs as many of both, at least one")
        ratios = sorted(a / b for a, b in zip(times, others, strict=True))
        outside = _outside(len(ratios))
        return cls(statistics.median(ratios), ratios[outside], ratios[-1 - outside])

    @property
    def is_faster(self) -> bool:
        """Whether the time is shorter than the other one by more than the noise."""
        return self.high < 1

    @property
    def is_slower(self) -> bool:
        """Whether the time is longer than the other one by more than the noise."""
        return self.low > 1

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def times_in_turn(
    models: Mapping[str, nn.Module], inputs: Inputs, *, blocks: int = 12, passes: int = 5, copies: bool = False
) -> dict[str, list[float]]:
    """Seconds of a forward pass in inference mode, one number a block, by name.

    Models take turns pass by pass, and a block's number is the least of its passes. The order stays the same: were it
    turned round, the first and the last would follow themselves, and find their weights in the cache.

    Args:
        models: in the mode in which they are to run.
        inputs: on the models' device.
        blocks: numbers for each model.
        passes: of each model in a block.
        copies: time other copies in each block, so that where weights happen to lie in memory counts as noise.

    Raises:
        ShallowerError: there is no model, or `blocks` or `passes` is not positive.
        ForwardError: a model does not run on the inputs.
    """
    if not models or blocks < 1 or passes < 1:
        raise ShallowerError("times_in_turn: give at least one model, one block and one pass")
    found: dict[str, list[float]] = {name: [] for name in models}
    timed = dict(models)
    with torch.inference_mode(), ExitStack() as stack:
        for model in models.values():
            stack.enter_context(unchanged(model))
        for _ in range(blocks):
            if copies:  # the last ones still hold their memory
                timed = {name: copy.deepcopy(model) for name, model in models.items()}
            for model in timed.values():
                call(model, inputs)
            least = dict.fromkeys(timed, math.inf)
            for _ in range(passes):
                for name, model in timed.items():
                    with failing(ForwardError, f"{name} does not run on these inputs any more"):
                        start = timer()
                        bare_call(model, inputs)
                        least[name] = min(least[name], timer() - start)
            for name, seconds in least.items():
                found[name].append(seconds)
    return found


def _outside(n: int) -> int:
    """How many of n ordered values lie outside on either side of the 95 % interval for the median."""
    k, total = -1, 1
    while 2 * total <= 0.05 * 2**n:
        k += 1
        total += math.comb(n, k + 1)
    return max(0, k)
