"""Fewer layers and branches, without training: those go that matter least, and what stays is refitted.

Damage is the divergence of the model's output on rows held out with a branch gone; the choice is greedy by damage for
each unit of the target's cost, measured anew as others go (BlockPruner, SLEB). What stays is fitted by least squares so
that the residual stream behind each cut is that of the dense network (ReplaceMe's linear map is the special case in
which one weight before the cut alone changes).

References: Zhong, Wan, Chen, Quan and Li, BlockPruner: Fine-grained pruning for large language models, 2024 (arXiv
2406.10594); Song et al., SLEB, 2024 (arXiv 2402.09025); Shopkhoev et al., ReplaceMe, 2025 (arXiv 2505.02819).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from shallower.core.inputs import Inputs, InputsOf
from shallower.core.modes import without_inference_mode
from shallower.core.processes import agreed_result, raised_anywhere
from shallower.errors import MethodError, SiteError, TargetError
from shallower.methods.base import bound_plan, check_sites
from shallower.methods.depth.choosing import Chooser, Removal
from shallower.methods.depth.compensating import Refitting
from shallower.methods.depth.emptying import emptied
from shallower.methods.depth.judging import Judge, set_apart
from shallower.methods.depth.saving import Layers, Savings, goal_of, savings_for
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.diagnosing import check_model
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.progress import Progress, identity_of
from shallower.methods.squeezing.squeeze import calibration_of, narrowable, timed_on, without_attached
from shallower.modules.offloading import with_mapped_weights
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Site, Sites
from shallower.surgery.operating import operate
from shallower.training.loop import Score


def squeeze_depth(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    target: str | Target | int,
    *,
    score: Score | None = None,
    refit: bool = True,
    inputs_of: InputsOf | None = None,
    example_inputs: Inputs | None = None,
    checkpoint: str | Path | None = None,
    options: SqueezeOptions | None = None,
) -> Plan:
    """A plan that takes branches and layers away until the target is met, and refits what stays, without training.

        sites = sh.find_sites(model, example_inputs, kinds=("hidden", "heads", "branch"))
        plan = sh.squeeze_depth(model, sites, batches, target="macs:80%")
        small = sh.apply(model, plan, example_inputs)
        sh.heal(small, model, batches)

    One row in eight is held out: branches are chosen by the divergence there, and a fit stays only where it brings the
    output nearer to the dense network's. Each entry's note says so, and how many passes it took.

    Args:
        model: in the state it is to be used in; it is not changed.
        sites: of this model. Those of kind "branch" may go; the hidden sites and heads among them keep all their
            channels, and are refitted.
        batches: a few hundred samples of what the model is used on, labels are not needed. They are read once.
        target: `params:`, `macs:`, `size:`, `kv:`, `latency:` on this device, or `drop:`, which needs `score`; or how
            many whole layers go.
        score: quality of a model, higher is better; for `drop:` alone.
        refit: whether what stays is refitted.
        inputs_of: returns the model's inputs in a batch, as for `squeeze`.
        example_inputs: what latencies are measured on; by default the inputs of the first batch.
        checkpoint: a folder for what is refitted so far; an interrupted call with the same arguments goes on from it.
        options: of the refitting, see `SqueezeOptions`; widths play no part.

    Raises:
        SiteError: no branch is among the sites, or the model cannot be called with the batches.
        TargetError: the target cannot be met, or the model meets it as it is.
        FitError: the calibration data are too few or not finite.
        MethodError: a `drop:` target comes without `score`, the count of layers is not positive, or the sites are of
            another model.
        CheckpointError: the checkpoint is damaged, or of another computation.

    Of several processes all raise what one of them raises.
    """
    goal = goal_of(target)
    options = options or SqueezeOptions()
    check_sites(model, sites)
    branches = sites.select(lambda site: site.kind == "branch")
    if not branches:
        raise SiteError(
            'there is no branch among the sites: find them with kinds=("hidden", "heads", "branch"). A branch is what '
            "is added to what it reads, or a layer that gives what has the form of its input"
        )
    with raised_anywhere(), without_inference_mode():
        dense = without_attached(with_mapped_weights(model))
        check_model(dense, branches)
        calibration = calibration_of(dense, sites, batches, options, inputs_of, example_inputs)
        timed = timed_on(calibration, example_inputs, dense)
        fitted, held = set_apart(calibration.batches)
        judge = Judge(dense, Calibration(held, options))
        savings = savings_for(dense, sites, goal, timed)
        progress = None
        if checkpoint is not None and refit:
            progress = Progress(checkpoint, identity_of(dense, sites, calibration.batches.digest, options))
        search = _Search(
            dense, _refittable(sites) if refit else [], branches, Calibration(fitted, options), judge, savings, progress
        )
        entries = search.entries(goal, score)
        plan = bound_plan(dense, entries, "squeeze_depth")
        return replace(plan, seen=calibration.batches.seen())


@dataclass(frozen=True)
class _Search:
    """What a call works with."""

    dense: nn.Module
    refittable: Sequence[Site]
    branches: Sequence[Site]
    calibration: Calibration
    judge: Judge
    savings: Savings | Layers
    progress: Progress | None

    def entries(self, goal: Target | int, score: Score | None) -> list[Entry]:
        """Of what goes, and of what is refitted."""
        chooser = Chooser(self.dense, self.branches, self.judge, self.savings)
        if isinstance(goal, Target) and goal.unit == "drop":
            if score is None:
                raise MethodError(f"the target {goal} needs score=, a function from a model to its quality")
            return self._within(goal, score, chooser)
        *_, last = chooser.removals()
        return self._completed(last, chooser.note(last))

    def _completed(self, removed: Removal, note: str) -> list[Entry]:
        """With what makes up for it."""
        found = [Entry.drop(site, note=note) for site in removed.sites]
        if self.refittable:
            refitting = Refitting(
                self.dense, self.refittable, removed.sites, self.calibration, self.judge, self.progress
            )
            found += refitting.entries()
        return found

    def _within(self, target: Target, score: Score, chooser: Chooser) -> list[Entry]:
        """As many as may go before the score falls below the floor.

        Raises:
            TargetError: with the first one it does.
        """
        floor = target.floor(agreed_result(score, self.dense))
        found: list[Entry] = []
        with suppress(TargetError):
            for removed in chooser.removals():
                tried = self._completed(removed, chooser.note(removed))
                small = emptied(self.dense, removed.sites)
                for step in steps(entry for entry in tried if entry.site.branch is None):
                    operate(small, step)
                reached = agreed_result(score, small)
                if reached < floor:
                    break
                found = tried
        if not found:
            raise TargetError(
                f"the target {target} allows a score of {floor:.4g}, and without the branch that matters least it is "
                f"{reached:.4g}. Allow more loss, or calibrate on more data"
            )
        return found


def _refittable(sites: Sites) -> Sequence[Site]:
    """The sites whose consumers can be fitted; those that share layers with others are left out."""
    try:
        return narrowable(sites.select(lambda site: site.kind not in ("branch", "stream") and bool(site.consumers)))
    except SiteError:
        return []
