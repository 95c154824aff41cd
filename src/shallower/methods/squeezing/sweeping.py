"""All sites squeezed in order: each calibrated on the network whose earlier sites are squeezed already.

sweep = Sweep(dense, sites, Calibration(batches))
plan, small = sweep.plan({"layer.0": 384, "layer.1": 0})    # 0: a full collapse
sweep.errors["layer.0"][384]
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from shallower.calibrating.collecting import collect_goals, collect_grams, samples_in
from shallower.calibrating.fisher import OutputOf, default_output_of, output_metrics
from shallower.calibrating.grams import Centred
from shallower.calibrating.site_grams import SiteGrams
from shallower.calibrating.walking import Walk
from shallower.calibrating.watching import Goals
from shallower.core.inputs import (
    InputsOf,
    MaskOf,
    call,
    default_inputs_of,
    default_mask_of,
    model_device,
    reiterable,
    to_device,
)
from shallower.core.memory import give_back
from shallower.errors import FitError
from shallower.methods.squeezing.refitting import (
    collapsed,
    enough_for_producers,
    error_curve,
    may_have_path,
    metric_of,
    narrowed,
)
from shallower.modules.attachment import detach
from shallower.planning.entries import Entry
from shallower.planning.fingerprints import fingerprint
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.saving.progress import Progress
from shallower.sites import Site
from shallower.surgery.operating import operate

_MEMORY = 1 << 28
"""Bytes of Gram matrices that are held at a time while curves are made, where passes run from the inputs."""

_SENSITIVE = 32
"""Batches, evenly spaced, on which sensitivity is measured."""

_PLENTY = 4
"""Positions for each number to be fitted that are plenty."""

_SCARCE = 2
"""Numbers to be fitted for each position that are too many, in spite of the ridge."""

_GOALS = 1 << 28
"""Bytes of the dense network's outputs that are held at a time, where passes run from the inputs."""


class CalibrationWarning(UserWarning):
    """There are too few calibration data for what is fitted to them."""


@dataclass(frozen=True)
class Calibration:
    """What squeezing is done with.

    Attributes:
        batches: what is calibrated on; kept in memory, so that every pass sees the same in the same order.
        compensation: how much of the error of the residual stream a site makes up for, 0 to 1.
        sensitivity: weight a site's outputs by what the model's output makes of them.
        producers: fit the kept rows of the producers too.
        paths: a site's kept channels may be joined by a linear path; its rank, and the number of channels beside it,
            are multiples of this. 0 for no paths.
        collapse: whether a site may also become one linear map.
        inputs_of, mask_of, output_of: how to read batches and the model's output.
        logits: see `fisher.output_metrics`.
        seed: of the random projections.
    """

    batches: Iterable[Any]
    compensation: float = 1.0
    sensitivity: bool = True
    collapse: bool = True
    inputs_of: InputsOf = default_inputs_of
    mask_of: MaskOf | None = None
    output_of: OutputOf = default_output_of
    logits: bool | None = None
    seed: int = 0
    producers: bool = True
    paths: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.batches, (list, tuple)):
            object.__setattr__(self, "batches", list(reiterable(self.batches)))

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(samples_in(self.inputs_of(batch)) for batch in self.batches)

    def metrics(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, Centred]:
        """What a change at each consumer's output does to the model's output; empty without sensitivity."""
        if not self.sensitivity:
            return {}
        names = [m.name for site in sites for m in site.consumers]
        batches = list(self.batches)
        return output_metrics(
            model,
            names,
            batches[:: -(-len(batches) // _SENSITIVE)] if batches else batches,
            inputs_of=self.inputs_of,
            mask_of=self.mask_of,
            output_of=self.output_of,
            logits=self.logits,
            seed=self.seed,
        )

    def goals(self, dense: nn.Module, sites: Sequence[Site]) -> list[Goals]:
        """What the consumers of the first of these sites should give, of as many as fit into memory."""
        return collect_goals(
            dense,
            sites,
            self.batches,
            compensation=self.compensation,
            inputs_of=self.inputs_of,
            most=_GOALS,
        )

    def divergence(self, dense: nn.Module, small: nn.Module, batch: Any) -> tuple[int, float]:
        """On one batch: how many outputs count, and the sum of their divergences.

        Of logits the Kullback-Leibler divergence of the distributions, else the squared difference.
        """
        inputs = to_device(self.inputs_of(batch), model_device(dense))
        raw = call(dense, inputs)
        there, here = self.output_of(raw).float(), self.output_of(call(small, inputs)).float()
        categorical = hasattr(raw, "logits") if self.logits is None else self.logits
        if categorical:
            there, here = there.log_softmax(-1), here.log_softmax(-1)
            each = (there.exp() * (there - here)).sum(-1)
        else:
            each = (there - here).square().sum(-1)
        mask = default_mask_of(batch) if self.mask_of is None else self.mask_of(batch)
        if mask is not None and mask.shape == each.shape:
            each = each[mask.to(each.device).bool()]
        return each.numel(), float(each.sum())

    def grams(
        self,
        dense: nn.Module,
        small: nn.Module | None,
        sites: Sequence[Site],
        with_inputs: bool,
        with_rows: bool = False,
        goals: Sequence[Goals] | None = None,
        walk: Walk | None = None,
    ) -> dict[str, SiteGrams]:
        """Gram matrices of these sites."""
        return collect_grams(
            dense,
            small,
            sites,
            self.batches,
            goals=goals,
            walk=walk,
            compensation=0.0 if small is None else self.compensation,
            with_inputs=with_inputs,
            with_joint=with_inputs and self.paths > 0,
            with_rows=with_rows,
            inputs_of=self.inputs_of,
            mask_of=self.mask_of,
        )


@dataclass
class Sweep:
    """Squeezes a model to given widths, as often as asked.

    In memory are the dense network, those layers of the squeezed one that differ, the calibration data's inputs, what
    the last finished block of both networks gave (at most 256 MB, or as much as the model's weights take if that is
    more), and of one site at a time the Gram matrices, O((n + d)^2) for hidden width n and input width d, and at most
    131,072 rows of what its producer reads. Where passes have to run from the inputs, up to 256 MB of what the dense
    network's consumers give take the place of the blocks'.

    Attributes:
        dense: the model as it is; never changed.
        sites: those that may be squeezed, in order of execution.
        calibration: what they are squeezed with.
        progress: keeps what is done, and goes on from it.
        walking: go on from finished blocks; where not, every pass runs from the inputs.
    """

    dense: nn.Module
    sites: Sequence[Site]
    calibration: Calibration
    progress: Progress | None = None
    walking: bool = True
    _metrics: dict[str, Centred] | None = None
    _errors: dict[str, dict[int, float]] | None = None
    _positions: dict[str, float] = field(default_factory=dict)
    _drafts: dict[str, list[Entry]] = field(default_factory=dict)
    _shortage: dict[str, float] = field(default_factory=dict)

    def without_producers(self) -> Sweep:
        """The same, with the producers left as they are: a draft, of which this sweep repeats what it can."""
        return replace(self, calibration=replace(self.calibration, producers=False))

    def plan(self, widths: Mapping[str, int]) -> tuple[Plan, nn.Module]:
        """Squeeze to these widths, 0 for a full collapse: the plan, and the network it makes.

        Raises:
            FitError: the calibration data are too few or not finite; the error names the site.
        """
        chosen = ",".join(f"{site.name}={widths[site.name]}" for site in self.sites)
        key = chosen if self.calibration.producers else f"consumers only: {chosen}"
        entries = [] if self.progress is None else self.progress.entries(key)
        if self.calibration.producers:
            entries = entries or self._repeated(self._drafts.get(chosen, []))
        small = _sharing_copy(self.dense)
        for done in steps(entries):
            _operate(small, done)
        finished = {entry.site.name for entry in entries}
        changing = [site for site in self.sites if widths[site.name] != site.width]
        metrics = self.metrics if len(finished) < len(changing) else {}
        goals: list[Goals] = []
        walk = self._walk(small, [site for site in changing if site.name not in finished])
        for i, site in enumerate(tqdm(changing, desc="squeezing", delay=2, leave=False)):
            width = widths[site.name]
            if site.name in finished:
                continue
            if not walk.on and (not goals or site.name not in goals[0]):
                goals = self.calibration.goals(self.dense, changing[i:])
            producers = self.calibration.producers and width > 0 and _untouched(site, entries)
            if not enough_for_producers(site, width, self._positions.get(site.name, float("inf"))):
                producers = False
            paths = self._paths(site, widths)
            with_inputs = width == 0 or paths > 0
            found = self.calibration.grams(self.dense, small, [site], with_inputs, producers, goals or None, walk)
            grams = found.pop(site.name)
            self._positions[site.name] = grams.positions
            if producers and not enough_for_producers(site, width, grams.positions):
                producers, grams = False, replace(grams, rows=((), ()))
            metric = metric_of(site, metrics, grams)
            try:
                if width == 0:
                    entry = collapsed(site, grams, metric)
                else:
                    entry = narrowed(site, grams, metric, width, small if producers else None, paths=paths)
            except FitError as error:
                raise FitError(f"{site.name}: {error}") from error
            self._shortage[site.name] = _numbers(entry) / max(1.0, grams.fit.count)
            entries.append(entry)
            _operate(small, next(step for step in steps(entries) if step.entry is entry))
            del found, grams, metric
            give_back()
            if self.progress is not None:
                self.progress.keep(key, entries)
        if not self.calibration.producers:
            self._drafts[chosen] = list(entries)
        return Plan(tuple(entries), fingerprint(self.dense, [e.site for e in entries]), "squeeze"), small

    def warn_of_shortage(self, plan: Plan) -> None:
        """Warn where each of the consumers' outputs has several numbers to fit for each position that was seen."""
        short = {e.site.name: self._shortage.get(e.site.name, 0.0) for e in plan.entries}
        name = max(short, key=short.__getitem__, default="")
        if not name or short[name] <= _SCARCE:
            return
        entry = next(e for e in plan.entries if e.site.name == name)
        numbers, samples = _numbers(entry), self.calibration.samples
        others = sum(ratio > _SCARCE for ratio in short.values()) - 1
        warnings.warn(
            f"{name}: each output of `{entry.site.consumers[0].name}` is fitted with {numbers} numbers on "
            f"{numbers / short[name]:.0f} positions{f', and {others} more sites have too few' if others else ''}. What "
            f"was fitted will not hold on other data: calibrate on about {math.ceil(_PLENTY * short[name] * samples)} "
            f"samples or more ({samples} now), or leave the site out",
            CalibrationWarning,
            stacklevel=3,
        )

    def _repeated(self, draft: Sequence[Entry]) -> list[Entry]:
        """The draft's entries up to the first site whose producers may be fitted: a sweep with them makes the same."""
        same: list[Entry] = []
        for entry in draft:
            positions = self._positions.get(entry.site.name, float("inf"))
            kept = len(entry.kept)
            if kept and _untouched(entry.site, same) and enough_for_producers(entry.site, kept, positions):
                break
            same.append(entry)
        return same

    def _paths(self, site: Site, widths: Mapping[str, int] | None = None) -> int:
        """As in `Calibration`, for one site: what a later site is to be fitted to must not be a linear path itself."""
        later = [s for s in self.sites if widths is None or widths[s.name] != s.width]
        made = {m.name for s in later for m in (s.producer, s.gate) if m is not None}
        return 0 if made & {m.name for m in site.consumers} or not may_have_path(site) else self.calibration.paths

    def _walk(self, small: nn.Module | None, sites: Sequence[Site]) -> Walk:
        batches = self.calibration.batches
        return Walk.along(self.dense, small, sites if self.walking else (), batches, self.calibration.inputs_of)

    @property
    def metrics(self) -> dict[str, Centred]:
        """What the model's output makes of a change at each consumer's output."""
        if self._metrics is None:
            self._metrics = self.calibration.metrics(self.dense, self.sites)
            give_back()
        return self._metrics

    @property
    def errors(self) -> dict[str, dict[int, float]]:
        """For each site, the error at every width; at width 0, of a full collapse where that is possible."""
        if self._errors is None and self.progress is not None and (kept := self.progress.value("errors")) is not None:
            self._errors = kept
        if self._errors is None:
            self._errors = {}
            waiting = list(self.sites)
            walk = self._walk(None, waiting)
            while waiting:
                group = waiting[:1] if walk.on else _group(waiting)
                waiting = waiting[len(group) :]
                with_inputs = self.calibration.collapse or any(map(self._paths, group))
                found = self.calibration.grams(self.dense, None, group, with_inputs, walk=walk)
                for site in group:
                    grams = found.pop(site.name)
                    curve = error_curve(site, grams, metric_of(site, self.metrics, grams), paths=self._paths(site))
                    positions = sum(m.positions for m in site.consumers) / len(site.consumers)
                    scale = positions if self.calibration.sensitivity else 1.0
                    self._errors[site.name] = {width: scale * error for width, error in curve.items()}
            if self.progress is not None:
                self.progress.keep_value("errors", self._errors)
        return self._errors


def _numbers(entry: Entry) -> int:
    """Weights that are fitted for each of the consumers' outputs."""
    site, producer = entry.site, entry.site.producer
    if len(entry.kept):
        return len(entry.kept) * site.consumers[0].taps
    return 0 if producer is None else producer.d_in


def _untouched(site: Site, entries: Sequence[Entry]) -> bool:
    """Whether no map of the site was fitted as the consumer of an earlier site: such rows are not fitted again."""
    return not {m.name for entry in entries for m in entry.site.consumers} & {m.name for m in site.maps}


def _group(sites: Sequence[Site]) -> Sequence[Site]:
    """The first of the sites: as many as their Gram matrices fit into memory together."""
    room = _MEMORY
    for i, site in enumerate(sites):
        columns = site.width * site.consumers[0].taps
        d_in = site.producer.d_in if site.producer is not None else 0
        room -= 16 * (columns + d_in) ** 2
        if room < 0:
            return sites[: max(1, i)]
    return sites


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A detached copy whose parameters share their memory with the model's."""
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    duplicate = copy.deepcopy(model, dict(shared))
    detach(duplicate)
    return duplicate


def _operate(small: nn.Module, step: Step) -> None:
    """Surgery on a copy that shares its parameters: what may be written into gets memory of its own."""
    for m in step.entry.site.maps:
        module = small.get_submodule(m.name)
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(p.detach().clone(), p.requires_grad))
    operate(small, step)
