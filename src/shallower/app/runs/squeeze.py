"""`shallower compress --method squeeze`: a few hundred rows, no labels, no training unless `--heal` asks for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from shallower.app import quality as qualities
from shallower.app.compression import TIMING_SECONDS, Outcome, Work
from shallower.app.options import Squeezing
from shallower.app.results import CurvePoint
from shallower.calibrating.augmenting import augment_tokens
from shallower.calibrating.recalibration import recalibrate
from shallower.core.inputs import Inputs
from shallower.errors import DataError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import narrowable, squeeze, squeeze_family
from shallower.planning.costs import cost_after
from shallower.planning.curve import Point
from shallower.planning.family import Family
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.surgery.applying import apply

if TYPE_CHECKING:
    from shallower.training import History
    from shallower.training.loop import Score

FEWEST = 16
"""Rows below which nothing can be fitted."""


@dataclass(frozen=True)
class SqueezeRun(Squeezing):
    """Squeezing by calibration.

    run_method(work, SqueezeRun(samples=256))
    """

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """All hidden sites, with attention heads if asked for."""
        if self.heads:
            return find_sites(model, example, kinds=("hidden", "heads"))
        return find_sites(model, example)

    def usable(self, sites: Sites, target: Target | None) -> Sites:  # noqa: ARG002 - narrowing pays in every unit
        """The sites whose channels can be kept one by one."""
        return narrowable(sites)

    def preview(self, work: Work, sites: Sites) -> Plan:
        """The very plan."""
        return self._plan(work, sites, calibration_rows(work, self.samples, vary=self.vary))

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Calibrate, squeeze, measure BatchNorm again where that helps, and heal if asked to.

        Raises:
            DataError: there are too few rows to calibrate on.
        """
        calibration = calibration_rows(work, self.samples, vary=self.vary)
        plan = self._plan(work, sites, calibration)
        small = apply(work.model, plan, work.example).eval()
        small, measured_anew = recalibrated(small, work, calibration)
        details: dict[str, Any] = {
            "batchnorm_recalibrated": measured_anew,
            "calibrated": work.batches.sample_size(self.samples),
        }
        if self.heal:
            details["healing"] = asdict(healed(small, work, self.heal))
        family, points = None, []
        if self.sizes:
            family = self._family(work, sites, calibration, plan)
            points = list(_points_of(work, family))
        healing = "" if self.heal else ", heal (--heal 1)"
        advice = f"ask for less{healing}, or calibrate on more (--samples, {self.samples} now)"
        note = "healed" if self.heal else "squeezed"
        return Outcome(small, plan, note, advice, details=details, points=points, family=family)

    def _family(self, work: Work, sites: Sites, calibration: list[Any], plan: Plan) -> Family:
        """Plans down to the size of this one."""
        smallest = work.target
        if smallest.unit in ("latency", "drop"):
            before = cost_of(work.model, work.example)
            smallest = Target("macs", "share", cost_after(plan, before, work.model).macs / before.macs)
        work.tell(f"squeezing to {self.sizes} other sizes")
        return squeeze_family(
            work.model,
            sites,
            calibration,
            smallest,
            self.sizes,
            uniform=self.uniform,
            checkpoint=work.kept("family"),
            options=self._options(work),
        )

    def _plan(self, work: Work, sites: Sites, calibration: list[Any]) -> Plan:
        target, score = wanted(work)
        return squeeze(
            work.model,
            sites,
            calibration,
            target,
            score=score,
            uniform=self.uniform,
            example_inputs=work.example,
            checkpoint=work.kept("squeeze"),
            options=self._options(work),
        )

    def _options(self, work: Work) -> SqueezeOptions:
        return SqueezeOptions(
            round_to=self.round_to, linear_path=self.linear_path, logits=work.logits, seed=work.recipe.seed
        )


def calibration_rows(work: Work, samples: int, *, vary: bool = False) -> list[Any]:
    """So many rows of the training data, rearranged too if asked for.

        calibration_rows(work, 512)

    Raises:
        DataError: there are too few.
    """
    rows: Any = work.batches.train.dataset
    if len(rows) < FEWEST:
        counted = qualities.rows_of(work.task.quality)
        raise DataError(f"{len(rows)} {counted} are too few to calibrate on; give a few hundred")
    given = work.sample(samples)
    if vary:
        return list(augment_tokens(given, seed=work.recipe.seed))
    return given


def healed(small: nn.Module, work: Work, passes: int, **limits: Any) -> History:
    """Distil into `small`, in place, on the training data.

    history = healed(small, work, passes=8)
    """
    from shallower.training.guiding import Healing
    from shallower.training.healing import heal
    from shallower.training.matching import Matching

    recipe = work.recipe
    return heal(
        small,
        work.model,
        work.batches.sampled(),
        Healing(passes, lr=work.lr, precision=recipe.precision, seed=recipe.seed, **limits),
        Matching(logits=work.logits),
        checkpoint=work.kept("healing.safetensors"),
        cpu=work.cpu,
    )


def wanted(work: Work) -> tuple[Target, Score | None]:
    """The target, and of a loss of score the score that it limits.

    target, score = wanted(work)
    """
    if work.target.unit != "drop":
        return work.target, None
    assert work.floor is not None
    return Target("drop", "absolute", max(0.0, work.score(work.model) - work.floor)), work.score


def _points_of(work: Work, family: Family) -> Iterator[CurvePoint]:
    """The whole model and every size of a family, scored and timed."""
    models = {"dense": work.model}
    for number, member in enumerate(family):
        models[str(number)] = apply(work.model, member.plan, work.example).eval()
    times = compare(models, work.example, seconds=TIMING_SECONDS)
    for name, model in tqdm(models.items(), desc="measuring the sizes", delay=2, leave=False):
        timed = times[name]
        cost = replace(cost_of(model, work.example), latency=timed.latency)
        label, widths = "the model as it was", {}
        if model is not work.model:
            member = family.members[int(name)]
            label = f"{cost.params / family.before.params:.0%} of the parameters"
            widths = {entry.site.name: len(entry.kept) for entry in member.plan.entries}
        point = Point(label, widths, work.score(model), cost, timed.spread)
        yield CurvePoint.of(point, test_score=work.task.score(model, work.batches.test))


def recalibrated(small: nn.Module, work: Work, calibration: list[Any]) -> tuple[nn.Module, bool]:
    """With BatchNorm statistics measured again, where the score on the rows to choose by is better so; and whether.

    small, better = recalibrated(small, work, rows)
    """
    if not any(isinstance(module, _BatchNorm) for module in small.modules()):
        return small, False
    other = copy.deepcopy(small)
    recalibrate(other, calibration)
    better = work.score(other) > work.score(small)
    return (other if better else small), better
