"""`shallower compress`: whatever gains most in the minutes that there are.

Squeezing comes first: it takes seconds and brings most. The rest of the time goes into healing, as long as rows held
out gain. If time is left even then, and there are labels, layers are collapsed by training, and what is better on
validation rows is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from shallower.app.batching import drawn_rows
from shallower.app.compression import Outcome, Work
from shallower.app.deciding.clock import spoken
from shallower.app.deciding.telling import outlook
from shallower.app.options import Deciding, Squeezing
from shallower.app.quality import rows_of
from shallower.app.runs.layer_collapse import LayerCollapseRun
from shallower.app.runs.schedule import Schedule
from shallower.app.runs.squeeze import SqueezeRun, healed
from shallower.errors import SiteError, TargetError
from shallower.modules.attachment import detached_copy
from shallower.sites import Sites
from shallower.training import History

_FEWEST_COLLAPSED = 2_000
"""Rows below which a training that collapses layers is not tried."""


@dataclass(frozen=True)
class AutoRun(Deciding, SqueezeRun):
    """Squeezing, then healing, then collapsing, as far as the minutes go.

    run_method(work, AutoRun())
    """

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Spend the time where the result gains most.

        Raises:
            TargetError: the target cannot be met.
            DataError: there are too few rows to calibrate on.
        """
        schedule = Schedule(work, sites, self.sizes)
        work = schedule.work
        samples = schedule.samples(self.samples)
        work.tell(schedule.words(samples))
        outcome = self._squeezed(work, sites, samples)
        squeezed = schedule.clock.spent
        took = spoken(squeezed - schedule.begun)
        story = [f"{_narrowed(outcome)} fitted anew on {samples:,} {rows_of(work.task.quality)}, in {took}."]
        details: dict[str, Any] = {**outcome.details, "calibrated": samples, "squeezing_seconds": squeezed}
        history, note = None, outcome.note
        seconds, rows, passes = schedule.healing(self.heal)
        if seconds:
            work.tell(f"healing on {rows:,} {rows_of(work.task.quality)}, at most {spoken(seconds)}")
            history = healed(outcome.model, work, passes, seconds=seconds, rows=rows)
            story.append(_healing(history, schedule.clock.spent - squeezed))
            details["healing"], note = asdict(history), "healed"
        outcome = replace(outcome, note=note, details=details)
        outcome = replace(outcome, story=" ".join(story), outlook=outlook(history, schedule.clock.seconds))
        return replace(self._better(work, schedule, outcome), judged=work.batches)

    def _squeezed(self, work: Work, sites: Sites, samples: int) -> Outcome:
        chosen = {option.name: getattr(self, option.name) for option in fields(Squeezing)}
        return SqueezeRun(**{**chosen, "samples": samples, "heal": 0}).make(work, sites)

    def _better(self, work: Work, schedule: Schedule, outcome: Outcome) -> Outcome:
        """The outcome, or that of a training that collapses layers, where it is better on the validation rows."""
        rows = schedule.collapsing()
        if not work.task.labelled or work.target.unit in ("drop", "kv") or rows < _FEWEST_COLLAPSED:
            return outcome
        score = work.score(outcome.model)
        if score >= work.score(work.model):
            return outcome
        work.tell(f"collapsing layers by training on {rows:,} rows, to see whether that is better")
        run = LayerCollapseRun()
        train = drawn_rows(work.batches.sampled(), rows, work.recipe.seed)
        other = replace(
            work,
            model=detached_copy(work.model),
            batches=replace(work.batches, train=train),
            recipe=replace(work.recipe, epochs=1),
        )
        try:
            sites = run.usable(run.find(other.model, other.example).select(work.sites), work.goal)
            collapsed = run.make(other, sites)
        except (SiteError, TargetError) as error:
            return replace(outcome, story=f"{outcome.story} Collapsing layers by training did not do: {error}.")
        reached = work.score(collapsed.model)
        if reached <= score:
            tried = f"Collapsing {len(collapsed.plan)} sites by training was worse ({work.task.show(reached)} against "
            return replace(outcome, story=f"{outcome.story} {tried}{work.task.show(score)} on the validation rows).")
        story = (
            f"{len(collapsed.plan)} of the sites were collapsed by training on {rows:,} rows: on the validation rows "
            f"that is better than squeezing and healing ({work.task.show(reached)} against {work.task.show(score)})."
        )
        outlook = "More minutes would let it train on more rows."
        return replace(collapsed, story=story, outlook=outlook, points=outcome.points, family=outcome.family)


def _narrowed(outcome: Outcome) -> str:
    """What squeezing did, as the beginning of a sentence."""
    merged = sum(1 for entry in outcome.plan.entries if not len(entry.kept))
    narrower = len(outcome.plan) - merged
    parts = []
    if narrower:
        parts.append(f"{narrower} sites were made narrower")
    if merged:
        parts.append(f"{merged} became one linear map each")
    return " and ".join(parts) + ","


def _healing(history: History, seconds: float) -> str:
    """What healing did, in a sentence."""
    before, best = history.before, history.best
    if before is None or best is None or best <= before:
        return f"Healing for {spoken(seconds)} brought nothing on the rows held out, and was taken back."
    return (
        f"Healing for {spoken(seconds)} took the divergence from the original, on rows held out, from {-before:.3g} to "
        f"{-best:.3g}."
    )
