"""`shallower compress --method tlc`: activations are taken away a few at a time, with training in between."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from shallower.app.compression import Outcome, Work
from shallower.app.options import TillLayersCollapsing
from shallower.app.results import CurvePoint
from shallower.core.codec import decode, encode
from shallower.core.files import read_json, write_json
from shallower.core.inputs import Inputs
from shallower.errors import CheckpointError, TargetError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.methods.tlc.choosing import choose_forms
from shallower.methods.tlc.pace import Pace, Round
from shallower.methods.tlc.till_layers_collapse import TillLayersCollapse
from shallower.modules.attachment import detached_copy
from shallower.planning.curve import Point
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.surgery.applying import apply

STATISTICS_ROWS = 256
"""Rows of the training data on which statistics are taken where no BatchNorm tells them."""

_TIMED = 10


@dataclass(frozen=True)
class TillLayersCollapseRun(TillLayersCollapsing):
    """TLC.

    run_method(work, TillLayersCollapseRun(criterion="loss"))
    """

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """All sites, and the activations outside of them."""
        return find_sites(model, example, kinds=("hidden", "activation"))

    def usable(self, sites: Sites, target: Target | None) -> Sites:  # noqa: ARG002 - what pays is told after merging
        """Those that may become linear.

        Raises:
            SiteError: there is none; the error says why.
        """
        return sites.usable(lambda site: site.bridge.not_linear, "there is no activation that can be taken away")

    def preview(self, work: Work, sites: Sites) -> Plan:
        """The activations that would go now, without training in between."""
        method = self._method(work, sites)
        try:
            return self._one_shot(method, work)
        finally:
            method.detach()

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Take activations away round by round, merge what becomes cheaper so.

        Raises:
            TargetError: the first round already took the score under the floor.
        """
        method = self._method(work, sites)
        points = _Points(work)
        each, most, validation = self.per_round, None, None
        if work.target.unit != "drop":
            each = each or 1
            most = -(-len(self._one_shot(method, work)) // each)
        if self.criterion == "loss" or each is None:
            validation = work.batches.validation
        try:
            rounds = method.fit(
                work.batches.train,
                work.task.loss,
                work.recipe,
                Pace(each, most),
                validation=validation,
                score=work.score,
                floor=work.floor,
                on_round=lambda round_: points.add(round_, method),
                checkpoint=work.training(),
                cpu=work.cpu,
            )
            removed = method.linear
            last = rounds[-1]
            if not removed:
                score = work.task.show(last.score if last.score is not None else float("nan"))
                raise TargetError(
                    f"no activation could go: without {', '.join(last.linearised)} the {work.task.quality} is {score}. "
                    "Allow more loss, or train longer (--epochs)"
                )
            plain = detached_copy(work.model).eval()
            plan = choose_forms(plain, method.plan(), work.example)
            small = apply(plain, plan, work.example).eval()
        finally:
            method.detach()
        return Outcome(
            small,
            plan,
            f"{len(removed)} removed",
            f"{len(removed)} activations are gone. Allow more loss, train longer (--epochs), or ask for less",
            details={"removed": list(removed), "rounds": [asdict(round_) for round_ in rounds]},
            points=points.found,
        )

    def _method(self, work: Work, sites: Sites) -> TillLayersCollapse:
        return TillLayersCollapse(
            work.model, sites, criterion=self.criterion, batches=work.sample(STATISTICS_ROWS), seed=work.recipe.seed
        )

    def _one_shot(self, method: TillLayersCollapse, work: Work) -> Plan:
        return method.plan(
            target=work.target,
            score=work.score,
            example_inputs=work.example,
            validation=work.batches.validation if self.criterion == "loss" else None,
            loss=work.task.loss if self.criterion == "loss" else None,
        )


class _Points:
    """The curve of score against removed activations, kept beside the state of the training."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.path: Path | None = work.kept("points.json")
        self.found: list[CurvePoint] = []
        if self.path is not None and self.path.exists():
            data = read_json(self.path, error=CheckpointError)
            self.found = decode(list[CurvePoint], data, at=str(self.path), error=CheckpointError)

    def add(self, round_: Round, method: TillLayersCollapse) -> None:
        plain = detached_copy(self.work.model).eval()
        small = apply(plain, method.plan(), self.work.example).eval()
        cost, times = cost_of(small, self.work.example), compare({"": small}, self.work.example, rounds=_TIMED)
        count = len(round_.removed)
        self.found = [point for point in self.found if (point.removed or 0) < count]
        point = Point(f"{count} removed", {}, round_.score or 0.0, replace(cost, latency=times[""].latency))
        self.found.append(CurvePoint.of(point, removed=count))
        if self.path is not None:
            write_json(self.path, encode(self.found), error=CheckpointError)
