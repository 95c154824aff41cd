"""All sites squeezed in order: each calibrated on the network whose earlier sites are squeezed already.

sweep = Sweep(dense, sites, Calibration(batches))
plan, small = sweep.plan({"layer.0": 384, "layer.1": 0})    # 0: a full collapse
sweep.errors["layer.0"][384]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

from torch import nn
from tqdm.auto import tqdm

from shallower.calibrating.collecting import one_site
from shallower.calibrating.grams import Centred
from shallower.calibrating.recording import Goals
from shallower.calibrating.site_grams import SiteGrams
from shallower.calibrating.walking import Walk
from shallower.core.memory import give_back
from shallower.errors import FitError, Refusal
from shallower.methods.base import bound_plan
from shallower.methods.squeezing.calibration import Calibration, mean_divergence
from shallower.methods.squeezing.coupled.coupling import (
    Coupling,
    has_shift,
    in_order,
    outputs_gone,
    read_anew,
    set_rows,
    silence,
    with_rows,
)
from shallower.methods.squeezing.curves import error_curves
from shallower.methods.squeezing.progress import Progress
from shallower.methods.squeezing.refitting import (
    collapsed_fit,
    enough_for_producers,
    has_intercept,
    may_have_path,
    metric_of,
    narrowed_fit,
)
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import lent
from shallower.planning.entries import Entry
from shallower.planning.forms import Step, steps
from shallower.planning.forms.steps import made_by
from shallower.planning.plan import Plan
from shallower.sites import Site, by_name
from shallower.surgery.operating import operate

_PLENTY = 4
"""Positions for each number to be fitted that are plenty."""

_SCARCE = 2
"""Numbers to be fitted for each position that are too many, in spite of the ridge."""


class CalibrationWarning(UserWarning):
    """There are too few calibration data for what is fitted to them."""


class Sweep:
    """Squeezes a model to given widths, as often as asked.

        plan, small = Sweep(dense, sites, Calibration(batches)).plan(widths)

    In memory are the dense network, those layers of the squeezed one that differ, the calibration data's inputs, what
    the last finished block of both networks returned (at most 256 MB, or as much as the model's weights take if that
    is more), and of one site at a time the Gram matrices, O((n + d)^2) for hidden width n and input width d, and at
    most 131,072 rows of what its producer reads. Where passes have to run from the inputs, up to 256 MB of what the
    dense network's consumers return take the place of the blocks'.

    Attributes:
        dense: the model as it is; never changed.
        sites: those that may be squeezed, in order of execution.
        calibration: what they are squeezed with.
        progress: keeps what is done, and goes on from it.
        walking: go on from finished blocks; where not, every pass runs from the inputs.
    """

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[Site],
        calibration: Calibration,
        progress: Progress | None = None,
        *,
        walking: bool = True,
    ) -> None:
        self.dense = dense
        self.sites = sites
        self.calibration = calibration
        self.progress = progress
        self.walking = walking
        # by site, what was seen of it while it was squeezed: positions of its producers, and rows to fit
        self._positions: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self.coupling = Coupling(dense, sites, calibration)

    def plan(self, widths: Mapping[str, int]) -> tuple[Plan, nn.Module]:
        """Squeeze to these widths, 0 for a full collapse: the plan, and the network it makes.

        Raises:
            FitError: the calibration data are too few or not finite; the error names the site.
        """
        key = ",".join(f"{site.name}={widths[site.name]}" for site in self.sites)
        entries = [] if self.progress is None else self.progress.entries(key)
        # what surgery writes into gets memory of its own
        small = detached_copy(self.dense, lent(self.dense.parameters()))
        cuts = self.coupling.cuts(widths, self.metrics)
        for done in steps(entries):
            operate(small, done)
        silence(small, cuts)
        changing = [site for site in self._named if widths[site.name] != site.width]
        for entry in self._remaining(changing, widths, entries, small, cuts):
            if self.progress is not None:
                self.progress.keep(key, len(entries), entry)
            entries.append(entry)
            operate(small, self._step(entry, entries))
            silence(small, cuts)
        every = [*entries, *cuts]
        for done in steps(every):
            if done.entry in cuts:
                operate(small, done)
        return bound_plan(self.dense, every, "squeeze"), small

    @property
    def _named(self) -> list[Site]:
        """The sites that are not coupled."""
        return [site for site in self.sites if site not in self.coupling.sites]

    @cached_property
    def metrics(self) -> dict[str, Centred]:
        """The influence on the model's output of a change at each consumer's output."""
        found = self.calibration.metrics(self.dense, [*self._named, *self.coupling.read(self.sites)])
        give_back()
        return found

    @cached_property
    def errors(self) -> dict[str, dict[int, float]]:
        """For each site, the error at every width; at width 0, of a full collapse where that is possible."""
        if self.progress is not None and (kept := self.progress.curves()) is not None:
            return kept
        named = self._named
        paths = {site.name: self._path_multiple(site, named) for site in named}
        found = error_curves(self.dense, named, self.calibration, self.metrics, paths, self._walk(None, named))
        found |= self.coupling.curves(self.metrics)
        if self.progress is not None:
            self.progress.keep_curves(found)
        return found

    def divergence(self, small: nn.Module) -> float:
        """How far its output is from the dense network's, on some of the batches."""
        return mean_divergence(self.calibration, self.dense, small)

    def warn_of_shortage(self, plan: Plan) -> None:
        """Warn where each of the consumers' outputs has several numbers to fit for each position that was seen."""
        short: dict[str, float] = {}
        for entry in plan.entries:
            ratio = _fitted_numbers(entry) / max(1.0, self._counts.get(entry.site.name, math.inf))
            if ratio > _SCARCE:
                short[entry.site.name] = ratio
        if not short:
            return
        name = max(short, key=short.__getitem__)
        entry = next(e for e in plan.entries if e.site.name == name)
        numbers, samples = _fitted_numbers(entry), self.calibration.batches.rows
        others = f", and {len(short) - 1} more sites have too few" * (len(short) > 1)
        warnings.warn(
            f"{name}: each output of `{entry.site.consumers[0].name}` is fitted with {numbers} numbers on "
            f"{numbers / short[name]:.0f} positions{others}. What was fitted will not hold on other data: calibrate "
            f"on about {math.ceil(_PLENTY * short[name] * samples)} samples or more ({samples} now), or leave the site "
            "out",
            CalibrationWarning,
            stacklevel=3,
        )

    def _step(self, entry: Entry, entries: Sequence[Entry]) -> Step:
        """The form that an entry's site takes after the earlier ones; only those that share layers with it matter."""
        related, layers = [entry], set(entry.site.layers)
        waiting = [other for other in entries if other is not entry]
        while near := [other for other in waiting if layers.intersection(other.site.layers)]:
            related += near
            layers.update(chain.from_iterable(other.site.layers for other in near))
            waiting = [other for other in waiting if other not in near]
        ordered = [other for other in entries if other in related]
        return next(step for step in steps(ordered) if step.entry is entry)

    def _remaining(
        self,
        changing: Sequence[Site],
        widths: Mapping[str, int],
        entries: Sequence[Entry],
        small: nn.Module,
        cuts: Sequence[Entry],
    ) -> Iterator[Entry]:
        """Entries of the sites that are not done, one after the other; `small` is changed before the next is asked for.

        Args:
            changing: sites that are squeezed, done or not.
            widths: by site.
            entries: of the sites that are done; grows between the sites.
            small: the network with these sites squeezed.
            cuts: of the coupled sites, whose readers are fitted between the other sites.
        """
        finished = {entry.site.name for entry in entries}
        made = {name: site for site in changing for name in made_by(site)}
        waiting = [site for site in changing if site.name not in finished]
        readers = self.coupling.read(entry.site for entry in cuts)
        left = [reader for reader in readers if made.get(reader.consumers[0].name, reader).name not in finished]
        if not waiting and not left:
            return
        if left:
            waiting = in_order(self.dense, waiting, left, self.calibration)
        metrics = self.metrics
        goals: list[Goals] = []
        walk = self._walk(small, waiting)
        total = len(changing) + len(readers)
        bar = tqdm(waiting, desc="squeezing", delay=2, leave=False, initial=total - len(waiting), total=total)
        for i, site in enumerate(bar):
            if not walk.on and (not goals or site.name not in goals[0]):
                goals = self.calibration.goals(self.dense, waiting[i:])
            if site in readers:
                entry = self._read_anew(site, made.get(site.consumers[0].name), metrics, small, goals, walk)
            else:
                producers = self.calibration.options.producers and widths[site.name] > 0 and untouched(site, entries)
                paths = self._path_multiple(site, changing)
                entry = self._one(site, widths[site.name], metrics, small, goals, walk, producers, paths, cuts)
                if any(m.name == reader.consumers[0].name for reader in readers for m in filter(None, [site.producer])):
                    entry = with_rows(entry, small)
            if entry is not None:
                yield entry
            give_back()

    def _read_anew(
        self,
        reader: Site,
        making: Site | None,
        metrics: Mapping[str, Centred],
        small: nn.Module,
        goals: Sequence[Goals],
        walk: Walk,
    ) -> Entry | None:
        """A reader of cut channels fitted; None where it makes the channels of a site, which then gets its rows."""
        grams = self._grams(reader, small, goals, walk, False, False)
        intercept = has_intercept(reader)
        if making is not None:
            intercept = has_shift(small, making)
        entry = read_anew(reader, grams, metric_of(reader, metrics, grams), small, intercept)
        if making is None:
            return entry
        set_rows(small, making, entry)
        return None

    def _one(
        self,
        site: Site,
        width: int,
        metrics: Mapping[str, Centred],
        small: nn.Module,
        goals: Sequence[Goals],
        walk: Walk,
        producers: bool,
        paths: int,
        cuts: Sequence[Entry],
    ) -> Entry:
        """One site squeezed, in the network with the earlier ones squeezed."""
        if not enough_for_producers(site, width, self._positions.get(site.name, math.inf)):
            producers = False
        inputs = width == 0 or paths > 0
        grams = self._grams(site, small, goals, walk, inputs, producers)
        self._positions[site.name] = grams.positions
        self._counts[site.name] = grams.fit.count
        if producers and not enough_for_producers(site, width, grams.positions):
            producers, grams = False, replace(grams, rows=((), ()))
        metric = metric_of(site, metrics, grams).without(outputs_gone(site, cuts))
        try:
            if width == 0:
                return collapsed_fit(site, grams, metric)
            return narrowed_fit(site, grams, metric, width, small if producers else None, paths=paths)
        except FitError as error:
            raise FitError(f"{site.name}: {error}") from error

    def _grams(
        self, site: Site, small: nn.Module, goals: Sequence[Goals], walk: Walk, inputs: bool, rows: bool
    ) -> SiteGrams:
        """Gram matrices of a site in the squeezed network; where that routes other rows to it, in the dense one."""
        found = self.calibration.grams(
            self.dense, small, [site], inputs=inputs, rows=rows, goals=goals or None, walk=walk
        )
        if isinstance(found[site.name], Refusal):
            found = self.calibration.grams(self.dense, None, [site], inputs=inputs, rows=rows)
        return one_site(found, site)

    def _path_multiple(self, site: Site, later: Sequence[Site]) -> int:
        """Of what rank and width are multiples, 0 for no path.

        What a later site is to be fitted to must not be a linear path itself.
        """
        made = set(chain.from_iterable(map(made_by, later)))
        if made & by_name(site.consumers).keys() or not may_have_path(site):
            return 0
        return self.calibration.options.path_multiple

    def _walk(self, small: nn.Module | None, sites: Sequence[Site]) -> Walk:
        along: Sequence[Site] = ()
        if self.walking:
            along = sites
        return Walk.along(self.dense, small, along, self.calibration.batches)


def _fitted_numbers(entry: Entry) -> int:
    """Weights that are fitted for each of the consumers' outputs."""
    site, producer = entry.site, entry.site.producer
    if len(entry.kept) and site.consumers:
        return len(entry.kept) * site.columns_each
    if producer is None:
        return 0
    return producer.d_in


def untouched(site: Site, entries: Sequence[Entry]) -> bool:
    """Whether no map of the site was fitted as the consumer of an earlier site: such rows are not fitted again.

    untouched(site, entries)
    """
    fitted = {m.name for entry in entries for m in entry.site.consumers}
    return not fitted & by_name(site.maps).keys()
