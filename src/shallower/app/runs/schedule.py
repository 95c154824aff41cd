"""How many rows and seconds each step of `shallower compress` gets, and the words that say so.

    schedule = Schedule(work, sites)
    samples = schedule.samples(512)
    print(schedule.words(samples))      # squeezing on 512 rows (about 20 s), healing for what is left (...), ...

What a step takes is estimated from what one forward pass and one inverse take, here and now.
"""

from __future__ import annotations

import math
from dataclasses import replace

from shallower.app.batching import MOST_SCORED
from shallower.app.compression import TIMING_SECONDS, Work
from shallower.app.deciding.clock import Decisions, algebra_seconds, measured_pace, spoken
from shallower.app.quality import rows_of
from shallower.app.runs.layer_collapse import SENSITIVITY_ROWS
from shallower.app.runs.squeeze import FEWEST
from shallower.errors import MethodError
from shallower.sites import Sites
from shallower.training.guiding import SHARE_OF_TRIAL, TRIAL

_PASSES = 14
"""Forward passes over the calibration rows that squeezing takes as long as, beside its algebra."""
_SHARE = 0.4
"""Of the time, at most, that goes into squeezing where it could go into healing."""
_SHARE_OF_SCORING = 0.12
"""Of the time, at most, that goes into scoring and certifying."""
_SCORINGS = 4
"""Passes over the rows scored: both models are scored and compared."""
_FEWEST_SCORED = 200
_FEWEST = 64
"""Rows that squeezing gets, however short the time is; of blocks of text, which are long, fewer do."""
_TIMES, _MOST_TIMES = 200, 25.0
"""Forward passes on the example by which a latency is planned, and their seconds at most."""
_OF_A_SIZE = 0.6
"""Of a squeezing, that another size takes."""
_STEP = 4
"""Forward passes that a step of training takes as long as."""
_RATES_TRIED = 4
"""That are tried until the best one is known."""
_SLACK = 1.5
"""So many times the passes that seem to fit are allowed, since what they take is a guess."""
_SEEN = 2
"""Times, at least, that healing shall see each of its rows."""
_FEWEST_HEALED, _MOST_HEALED = 500, 20_000
_STEPS_OF_A_PASS = 100
"""Of the rows to heal on: as many steps has a pass, or more."""
_TIMED_PASSES = 60
"""Forward passes on the example in which both models are timed, at most."""
_WRITING = 3.0
"""Seconds for the files of a result."""
_OVER = 1.2
"""So many times the minutes given a run may take."""


class Schedule:
    """How the time is divided.

    Args:
        work: what there is to do, and the time for it.
        sites: that may be narrowed.
        sizes: that are made besides.

    Attributes:
        work: the same, with as many rows to score on as there is time for.
        reporting: seconds that scores, timings and files take.
    """

    def __init__(self, work: Work, sites: Sites, sizes: int = 0) -> None:
        self.clock = work.clock
        self.begun = self.clock.spent
        self._decisions = Decisions(work.kept("decisions.json"))
        self._pace = pace = measured_pace(work.model, work.batches.sample(2 * work.batches.size))
        row = pace.of_rows(_SCORINGS, 1)
        affordable = self._decisions.number(
            "rows to score on",
            lambda: max(_FEWEST_SCORED, min(MOST_SCORED, int(_SHARE_OF_SCORING * self.clock.left / row))),
        )
        batches = work.batches.at_most(int(affordable))
        self.work = replace(work, batches=batches)
        counts = batches.counts
        self._train = counts["train"] or 0
        timing = pace.forward * batches.example_rows
        judged = counts["test"] or counts["validation"] or 0
        scored = row * judged + sizes * pace.of_rows(judged + (counts["validation"] or 0), 1)
        self._squeezings = 1 + _OF_A_SIZE * sizes
        self.reporting = scored + min(_TIMED_PASSES * timing, 2 * TIMING_SECONDS) + _WRITING
        self._fixed = algebra_seconds([site.width * site.columns_each for site in sites])
        if work.target.unit == "latency":
            self._fixed += min(_TIMES * timing, _MOST_TIMES)

    @property
    def left(self) -> float:
        """Seconds that are left for the model itself."""
        return max(0.0, self.clock.left - self.reporting)

    def samples(self, most: int) -> int:
        """Rows to calibrate on: as many as take a part of the time.

        Raises:
            MethodError: the time is too short for any.
        """
        row = self._pace.of_rows(1, _PASSES)
        fewest = FEWEST if self.work.task.quality == "perplexity" else _FEWEST

        def decide() -> float:
            return max(fewest, min(most, int((_SHARE * self.left / self._squeezings - self._fixed) / row)))

        samples = self.work.batches.sample_size(int(self._decisions.number("samples", decide)))
        needed = self.begun + self._squeezing(samples) + self.reporting
        if needed > _OVER * self.clock.seconds:
            raise MethodError(
                f"{spoken(self.clock.seconds)} are too few: reading the model and the data took {spoken(self.begun)}, "
                f"squeezing on {samples:,} rows takes about {spoken(self._squeezing(samples))} and scoring "
                f"{spoken(self.reporting)}. Give {needed / 60:.1f} minutes or more (--minutes), or fewer rows (--limit)"
            )
        return samples

    def _squeezing(self, samples: int) -> float:
        return self._squeezings * (self._pace.of_rows(samples, _PASSES) + self._fixed)

    def words(self, samples: int) -> str:
        """What is going to be done, and how long that takes."""
        squeezing = self._squeezing(samples)
        rows = rows_of(self.work.task.quality)
        healing = self.left - squeezing
        words = f"squeezing on {samples:,} {rows} (about {spoken(squeezing)})"
        if healing > 2 * self._trial(_FEWEST_HEALED, _SEEN):
            words += f", healing for what is left (at most {spoken(healing)})"
        return f"{words}, scoring and timing (about {spoken(self.reporting)}): {spoken(self.clock.seconds)} in all"

    def healing(self, passes: int) -> tuple[float, int, int]:
        """Seconds for healing, rows and passes, at most; nothing where there is no time for it."""
        row = self._pace.of_rows(1, _STEP)

        def rows() -> float:
            return max(_FEWEST_HEALED, min(_MOST_HEALED, int(self.left / (_SEEN * row))))

        read = min(int(self._decisions.number("rows to heal on", rows)), self._train)
        seconds = self._decisions.number("seconds to heal", lambda: self.left)
        fitting = min(passes, max(1, math.ceil(_SLACK * seconds / max(1e-9, read * row))))
        if passes == 0 or self._train < 2 * self.work.batches.size or seconds < 2 * self._trial(read, fitting):
            return 0.0, 0, 0
        return seconds, read, fitting

    def _trial(self, rows: int, passes: int) -> float:
        """Seconds of the search for a learning rate, see `heal`."""
        step = min(self.work.batches.size, max(1, rows // _STEPS_OF_A_PASS))
        least, most = TRIAL
        steps = min(max(passes * rows // step // SHARE_OF_TRIAL, least), most)
        return self._pace.of_rows(_RATES_TRIED * steps * step, _STEP)

    def collapsing(self) -> int:
        """Rows on which a training that collapses layers has time to train."""

        def rows() -> float:
            seconds = self.left - self._pace.of_rows(SENSITIVITY_ROWS, _PASSES)
            return max(0, int(0.8 * seconds / self._pace.of_rows(1, _STEP)))

        return min(self._train, int(self._decisions.number("rows to collapse by", rows)))
