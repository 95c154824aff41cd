"""What stays is refitted, so that the stream behind each cut is again what it is in the dense network.

    refitting = Refitting(dense, sites, dropped, calibration, judge)
    entries = refitting.entries()       # all channels kept, with fitted maps

The last site before a cut is fitted to the stream behind the cut: its consumers' outputs are to be that stream less
what they are added to. A linear map at the cut, folded into that consumer, is the case in which its weights alone
change. The sites behind the cut are fitted to their own outputs in the dense network, and to what is then still missing
in the stream, on inputs from the shallower network. Of all this, what does not help on rows held out is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.grams import Centred
from shallower.calibrating.recording import DenseOutputs, Goals
from shallower.calibrating.walking import Walk
from shallower.core.memory import give_back
from shallower.errors import FitError, Refusal
from shallower.methods.depth.emptying import emptied, inside
from shallower.methods.depth.judging import Judge
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.progress import Progress
from shallower.methods.squeezing.refitting import enough_for_producers, metric_of, narrowed_fit
from shallower.methods.squeezing.sweeping import untouched
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.sites import Site
from shallower.surgery.operating import operate


class Refitting:
    """The sites around some cuts, fitted one after the other.

    Attributes:
        dense: the model as it is.
        sites: whose consumers can be fitted, in order of execution; those that go, too.
        dropped: the branches that go.
        calibration: rows for fitting.
        judge: measures on the rows held out what a fit brings.
        progress: keeps what is done, and goes on from it.
    """

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[Site],
        dropped: Sequence[Site],
        calibration: Calibration,
        judge: Judge,
        progress: Progress | None = None,
    ) -> None:
        self.dense = dense
        self.sites = sites
        self.dropped = dropped
        self.calibration = calibration
        self.judge = judge
        self.progress = progress

    @cached_property
    def aims(self) -> dict[str, Site]:
        """By the last site before each cut, the last one in the cut."""
        found: dict[str, Site] = {}
        before: Site | None = None
        for site in self.sites:
            if not inside(site, self.dropped):
                before = site
            elif before is not None:
                found[before.name] = site
        return found

    @cached_property
    def touched(self) -> list[Site]:
        """The sites to be fitted: from the last one before the first cut on, those that stay."""
        found: list[Site] = []
        for site in self.sites:
            stays = not inside(site, self.dropped)
            if stays and (found or site.name in self.aims):
                found.append(site)
        if found or not self.sites:
            return found
        # what goes comes before all sites, or has none of its own
        return [site for site in self.sites if not inside(site, self.dropped)]

    def entries(self) -> list[Entry]:
        """Of the sites whose fit brings the output nearer to the dense network's, with that error in their notes.

        Raises:
            FitError: the calibration data are too few or not finite; the error names the site.
        """
        key = "without " + ",".join(site.name for site in self.dropped)
        done = [] if self.progress is None else self.progress.entries(key)
        small = emptied(self.dense, self.dropped)
        for step in steps(done):
            operate(small, step)
        names = [site.name for site in self.touched]
        first = 0
        if done:
            first = names.index(done[-1].site.name) + 1
        waiting = self.touched[first:]
        if not waiting:
            return done
        walk = Walk.along(self.dense, small, waiting, self.calibration.batches)
        goals: list[Goals] = []
        nearest = self.judge.divergence(small)
        for i, site in enumerate(tqdm(waiting, desc="refitting", delay=2, leave=False)):
            if not goals or site.name not in goals[0]:
                goals = self._goals(waiting[i:])
            entry = self._fitted(site, small, goals, walk, done)
            give_back()
            if entry is None:
                continue
            before = {m.name: copy.deepcopy(small.get_submodule(m.name)) for m in site.maps}
            operate(small, next(step for step in steps([*done, entry]) if step.entry is entry))
            divergence = self.judge.divergence(small)
            if not divergence < nearest:
                for name, module in before.items():
                    small.set_submodule(name, module)
                continue
            note = f"refitted: divergence on rows held out {nearest:.3g} -> {divergence:.3g}"
            entry, nearest = replace(entry, note=note), divergence
            if self.progress is not None:
                self.progress.keep(key, len(done), entry)
            done.append(entry)
        return done

    def _goals(self, sites: Sequence[Site]) -> list[Goals]:
        """What the consumers of the first of these sites should return, behind the cuts where they are before one."""
        ordered: list[Site] = []
        for site in sites:
            ordered.append(site)
            if site.name in self.aims:
                ordered.append(self.aims[site.name])
        found = self.calibration.goals(self.dense, ordered)
        moved: list[Goals] = []
        for goals in found:
            here = dict(goals)
            for name, aim in self.aims.items():
                if aim.name in goals and name in goals:
                    here[name] = _carried_back(goals[name], goals[aim.name])
                elif name != sites[0].name:
                    # what it aims at had no room: both come with another pass, as the first of the sites
                    here.pop(name, None)
            moved.append(here)
        return moved

    @cached_property
    def _metrics(self) -> Mapping[str, Centred]:
        found = self.calibration.metrics(self.dense, self.touched)
        give_back()
        return found

    def _fitted(
        self, site: Site, small: nn.Module, goals: Sequence[Goals], walk: Walk, done: Sequence[Entry]
    ) -> Entry | None:
        """All channels kept, with what least squares makes of the maps; None where the site cannot be calibrated."""
        metrics = self._metrics
        rows = self.calibration.options.producers and untouched(site, done)
        found = self.calibration.grams(self.dense, small, [site], rows=rows, goals=goals, walk=walk)
        grams = found[site.name]
        if isinstance(grams, Refusal):
            return None
        producers = None
        if rows and enough_for_producers(site, site.width, grams.positions):
            producers = small
        else:
            grams = replace(grams, rows=((), ()))
        try:
            return narrowed_fit(site, grams, metric_of(site, metrics, grams), site.width, producers)
        except FitError as error:
            raise FitError(f"{site.name}: {error}") from error


def _carried_back(
    own: Sequence[DenseOutputs] | Refusal, aim: Sequence[DenseOutputs] | Refusal
) -> Sequence[DenseOutputs] | Refusal:
    """What the outputs of one site are to be so that the sum behind it is the one behind another; else its own."""
    if isinstance(own, Refusal) or isinstance(aim, Refusal) or len(own) != len(aim):
        return own
    found: list[DenseOutputs] = []
    for here, there in zip(own, aim, strict=True):
        if len(here.y) != 1 or len(there.y) != 1 or not (here.streamed[0] and there.streamed[0]):
            return own
        if here.y[0].shape != there.y[0].shape:
            return own
        scaled = there.y[0] * _quotient(there.units[0], here.units[0], there.y[0])
        found.append(replace(here, y=(scaled,)))
    return found


def _quotient(above: Tensor, below: Tensor, like: Tensor) -> Tensor:
    """Of two scales of channels, 0 where the one below is 0, aligned with the channels of `like`."""
    ratio = torch.where(below == 0, 0.0, above / below).to(like)
    if like.dim() == 4:
        return ratio.reshape(-1, 1, 1)
    return ratio
