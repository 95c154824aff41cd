"""`shallower compress --method depth`: whole layers and branches go, and what stays is refitted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from shallower.app.compression import Outcome, Work
from shallower.app.options import DepthSqueezing
from shallower.app.runs.squeeze import calibration_rows, healed, recalibrated, wanted
from shallower.core.inputs import Inputs
from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.depth.squeeze_depth import squeeze_depth
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.surgery.applying import apply


@dataclass(frozen=True)
class DepthRun(DepthSqueezing):
    """Fewer layers, by calibration.

    run_method(work, DepthRun(samples=256))
    """

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """Branches and layers, and the sites that can be refitted."""
        return find_sites(model, example, kinds=("hidden", "heads", "branch"))

    def usable(self, sites: Sites, target: Target | None) -> Sites:  # noqa: ARG002 - fewer layers pay in every unit
        """All of them.

        Raises:
            SiteError: there is no branch among them.
        """
        if not any(site.branch is not None for site in sites):
            raise SiteError("there is neither a branch nor a layer among the sites that could be taken away")
        return sites

    def preview(self, work: Work, sites: Sites) -> Plan:
        """The very plan."""
        return self._plan(work, sites, calibration_rows(work, self.samples, vary=self.vary))

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Choose what goes, refit what stays, measure BatchNorm again where that helps, and heal if asked to.

        Raises:
            TargetError: the target cannot be met.
            DataError: there are too few rows to calibrate on.
        """
        calibration = calibration_rows(work, self.samples, vary=self.vary)
        plan = self._plan(work, sites, calibration)
        small = apply(work.model, plan, work.example).eval()
        small, measured_anew = recalibrated(small, work, calibration)
        gone = [entry.site.name for entry in plan.entries if entry.site.branch is not None]
        details: dict[str, Any] = {
            "batchnorm_recalibrated": measured_anew,
            "calibrated": work.batches.sample_size(self.samples),
            "gone": gone,
        }
        note = f"{len(gone)} gone"
        if self.heal:
            details["healing"], note = asdict(healed(small, work, self.heal)), "healed"
        healing = "" if self.heal else ", heal (--heal 8)"
        advice = f"ask for less{healing}, or calibrate on more (--samples, {self.samples} now)"
        return Outcome(small, plan, note, advice, details=details)

    def _plan(self, work: Work, sites: Sites, calibration: list[Any]) -> Plan:
        target, score = wanted(work)
        return squeeze_depth(
            work.model,
            sites,
            calibration,
            target,
            score=score,
            example_inputs=work.example,
            checkpoint=work.kept("depth"),
            options=SqueezeOptions(logits=work.logits, seed=work.recipe.seed),
        )
