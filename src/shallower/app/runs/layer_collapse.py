"""`shallower compress --method layer-collapse`: as few sites as meet the target are trained until they are linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from shallower.app.compression import Outcome, Work
from shallower.app.options import LayerCollapsing
from shallower.core.inputs import Inputs
from shallower.errors import SiteError, TargetError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.collapsing.stages import StageResult, Stages
from shallower.planning.costs import Cost, cost_after
from shallower.planning.entries import Entry
from shallower.planning.paying import PaidUnit, paying
from shallower.planning.plan import Plan
from shallower.planning.targets import Target, shortest_prefix
from shallower.sites import Site, Sites
from shallower.surgery.applying import apply

SENSITIVITY_ROWS = 256
"""Rows of the training data on which the sensitivity of the sites is measured."""

_COUNTED: Mapping[str, PaidUnit] = {"params": "params", "size": "params", "macs": "macs", "latency": "macs"}
"""What has to become less for a target; either of the two for any other."""


@dataclass(frozen=True)
class LayerCollapseRun(LayerCollapsing):
    """LayerCollapse.

    run_method(work, LayerCollapseRun(strength=1.0))
    """

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """All sites but attention heads and activation places."""
        return find_sites(model, example)

    def usable(self, sites: Sites, target: Target | None) -> Sites:
        """Those sites that become cheaper, in the unit of the target, when they collapse.

        Raises:
            SiteError: there is none; the error says why.
        """
        unit = "drop" if target is None else target.unit
        chosen, reasons = paying(sites, _COUNTED.get(unit, ""))
        if not chosen:
            told = [f"{name}: {reason}" for name, reason in {**reasons, **sites.skipped}.items()]
            listed = "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")
            raise SiteError(f"there is no site that can collapse and pays{': ' if listed else ''}{listed}")
        return sites.only(chosen)

    def preview(self, work: Work, sites: Sites) -> Plan:
        """The collapse of the sites that would be chosen; for a `drop` target, of all."""
        return Plan(tuple(Entry.collapse(site) for site in self._choose(work, sites)), method=self.name)

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Choose the sites, train them linear, and merge.

        Raises:
            TargetError: no site came near enough to linear, or the first one took the score under the floor.
        """
        model = work.model
        chosen = self._choose(work, sites)
        count, score = min(self.stages, len(chosen)), None
        if work.target.unit == "drop":
            count = len(chosen)
        if work.floor is not None:
            score = work.score
        method = LayerCollapse(model, chosen, self.strength, include="*")
        try:
            stages = method.fit(
                work.batches.train,
                work.task.loss,
                work.recipe,
                Stages(count, order=chosen.names, tolerance=self.tolerance),
                score=score,
                floor=work.floor,
                checkpoint=work.training(),
                cpu=work.cpu,
            )
            plan = method.plan(self.tolerance, batches=work.sample(SENSITIVITY_ROWS))
            collapsed, advice = stages[-1].collapsed, _advice(work, stages)
            if not collapsed:
                raise TargetError(f"no site could collapse: {advice}")
            small = apply(model, plan, work.example).eval()
        finally:
            method.detach()
        return Outcome(
            small,
            plan,
            f"{len(collapsed)} collapsed",
            f"{len(collapsed)} of {len(chosen)} sites collapsed, and {advice}",
            details={"collapsed": list(collapsed), "stages": [asdict(stage) for stage in stages]},
        )

    def _choose(self, work: Work, sites: Sites) -> Sites:
        """As few sites as meet the target, in the order in which they shall collapse; for a `drop` target, all."""
        model, target = work.model, work.target
        if self.order == "last-first":
            order = list(reversed(sites))
        else:
            method = LayerCollapse(model, sites, self.strength, include="*")
            try:
                costs = method.sensitivity(work.sample(SENSITIVITY_ROWS))
            finally:
                method.detach()
            order = sorted(sites, key=lambda site: costs[site.name])
        if target.unit == "drop":
            return sites.only(order)
        before = cost_of(model, work.example)
        timed = target.unit == "latency"
        latency = compare({"dense": model}, work.example)["dense"].latency if timed else None
        before = replace(before, latency=latency)

        def cost(prefix: Sequence[Site]) -> Cost:
            plan = Plan(tuple(Entry.collapse(site) for site in prefix))
            if latency is None:
                return cost_after(plan, before, model)
            speed = compare({"dense": model, "small": apply(model, plan, work.example)}, work.example)
            return Cost(0, 0, 0, latency * speed["small"].ratio)

        return sites.only(shortest_prefix(order, target, before, cost))


def _advice(work: Work, stages: Sequence[StageResult]) -> str:
    last = stages[-1]
    if last.taken_back and last.score is not None and work.floor is not None:
        sites = ", ".join(last.sites)
        return (
            f"with {sites} too the {work.task.quality} is {work.task.show(last.score)}, and "
            f"{work.task.show(work.floor)} is the limit. Allow more loss, train longer (--epochs), or ask for less"
        )
    slopes = ", ".join(f"{name} {slope:.2f}" for name, slope in last.slopes.items())
    return f"the slopes did not come near 1 ({slopes}). Train longer (--epochs) or pull harder (--strength)"
