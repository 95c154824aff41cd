"""Calibrated squeezing: the best narrower network that a few hundred samples can find, without training.

For each site, in order: choose the channels from which least squares predicts best what the consumers should give,
weighted by what the model's output makes of it, and fit the consumers anew. Each site is calibrated on the network
whose earlier sites are squeezed already, towards what the dense network does there. How many channels each site keeps
follows from the sites' curves of error against cost, or is the same share everywhere, whichever does better. Where the
target is a latency, the cost is what was measured on this machine (latencies.py), and the whole model is timed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from shallower import __version__
from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.calibrating.site_grams import may_collapse
from shallower.core.inputs import (
    Inputs,
    InputsOf,
    MaskOf,
    call,
    default_inputs_of,
    model_device,
    reiterable,
    tensors,
    to_device,
)
from shallower.core.modes import evaluating
from shallower.core.processes import from_first_process, summed_over_processes
from shallower.errors import FitError, MethodError, SiteError, TargetError
from shallower.measuring.measurement import compare
from shallower.methods.squeezing.latencies import Latency, narrowed_copy, site_latencies, stand_in
from shallower.methods.squeezing.sweeping import Calibration, Sweep
from shallower.modules.attachment import attached_places, detached_copy
from shallower.modules.offloading import mapped
from shallower.planning.allocation import Choice, allocate, in_proportion
from shallower.planning.fingerprints import fingerprint
from shallower.planning.plan import Plan
from shallower.planning.targets import Cost, Target
from shallower.saving.progress import Progress, digest
from shallower.sites import Site, Sites

Score = Callable[[nn.Module], float]

_TRIALS = 6
_JUDGED = 8
"""Batches on which allocated and equal widths are compared."""

_TIMINGS = 4
"""How often the whole model is timed, and the widths corrected, until a latency is met."""

_CLOSE = 0.97
"""A latency target is met well enough at this part of what it allows."""

_LEAST_TRUST = 0.5

_TIMED_ROUNDS = 15
"""The whole model is timed in so many rounds; on a busy machine in more, until the ratio is precise or time is up."""

_PRECISION = 0.01
_TIMED_SECONDS = 3.0
_ROUND_SECONDS = 2e-3
"""A round takes at least this long for each model, see `compare`."""


def squeeze(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    target: str | Target,
    *,
    score: Score | None = None,
    uniform: bool = False,
    round_to: int = 1,
    compensation: float = 1.0,
    sensitivity: bool = True,
    collapse: bool = True,
    producers: bool = True,
    linear_path: bool = False,
    example_inputs: Inputs | None = None,
    checkpoint: str | Path | None = None,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
    output_of: OutputOf = default_output_of,
    logits: bool | None = None,
    seed: int = 0,
) -> Plan:
    """A plan that makes the model's hidden widths smaller until the target is met, without training.

        plan = squeeze(model, sites, batches, target="params:60%")
        small = sh.apply(model, plan, example_inputs)

    Args:
        model: in the state it is to be used in; it is not changed. It may be offloaded by Accelerate: its weights are
            then mapped from their files, so that a model may be larger than memory.
        sites: of this model, or a selection of them.
        batches: a few hundred samples of what the model is used on, labels are not needed; iterated several times.
        target: `params:`, `macs:`, `memory:`, `latency:` on this device, or `drop:`, which needs `score`; see
            `budget.Target`.
        score: quality of a model, higher is better. Needed for `drop:`. Widths allocated by the sites' curves of error
            and equal widths are both tried, and the better one by this score is taken; without a score, the one whose
            output differs less from the model's on the batches.
        uniform: keep the same share of every site's channels, so that a stock class can express the result.
        round_to: widths are multiples of this.
        compensation: how much of the error that earlier sites left in the residual stream a site makes up for, 0 to 1.
        sensitivity: weight outputs by what the model's output makes of them (one backward pass over the batches).
        collapse: allow a site to become one linear map, where that is the better buy; not with `uniform`.
        producers: fit the kept rows of the producers too, not only the consumers: slower, and mostly better.
        linear_path: where it pays, let a linear map from what a site reads to what it gives stand beside fewer kept
            channels, of the rank that gives the least error at the same cost (see `linear_paths.py`). The activation
            becomes a `PartialActivation`, so that no stock class loads the result, but `sh.load` and what was exported.
            For linear layers and convolutions of 1x1; others stay without.
        example_inputs: what latencies are measured on; by default the inputs of the first batch.
        checkpoint: a file (.safetensors) for what is done so far. Where it exists, an interrupted squeezing of the same
            model on the same batches goes on from it, with the same result.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        output_of: picks the output that matters out of what the model returns.
        logits: whether that output is logits, whose distribution matters; by default, whether the model names it so.
        seed: of the random projections.

    Returns:
        A plan with fitted consumers; made for these weights.

    Raises:
        SiteError: no site can be made narrower, or the model cannot be called with the batches.
        TargetError: the target cannot be met, and the error says what can; or the model meets it as it is.
        FitError: the calibration data are too few or not finite; the error names the site.
        MethodError: an option is out of range, or a `drop:` target comes without `score`.
        CheckpointError: the checkpoint is damaged, or of another squeezing.

    Warns:
        CalibrationWarning: a site has far fewer positions to fit on than numbers to fit; how many samples would do.
    """
    if not 0 <= compensation <= 1 or round_to < 1:
        raise MethodError("compensation is a number from 0 to 1, and round_to at least 1")
    model = mapped(model)
    goal = Target.parse(target) if isinstance(target, str) else target
    if goal.unit == "drop" and score is None:
        raise MethodError(f"the target {goal} needs score=, a function from a model to its quality")
    squeezable = narrowable(sites)
    first = _first(batches)
    calibration = Calibration(
        batches,
        compensation=compensation,
        sensitivity=sensitivity,
        collapse=collapse and not uniform,
        producers=producers,
        paths=round_to if linear_path else 0,
        inputs_of=inputs_of,
        mask_of=mask_of,
        output_of=output_of,
        logits=logits,
        seed=seed,
    )
    dense = detached_copy(model) if attached_places(model) else model
    progress = None if checkpoint is None else Progress(checkpoint, _identity(dense, squeezable, calibration))
    sweep = Sweep(dense, squeezable, calibration, progress)
    calibrated_on = inputs_of(first)
    _check_call(dense, calibrated_on)
    inputs = calibrated_on if example_inputs is None else example_inputs
    work = _Squeeze(dense, squeezable, sweep, round_to, uniform, to_device(inputs, model_device(dense)))
    try:
        plan = work.within(goal, score) if goal.unit == "drop" and score is not None else work.best(goal, score)
        sweep.warn_of_shortage(plan)
        return plan
    except FitError as error:
        if name := _first_not_finite(dense, squeezable, calibration):
            raise FitError(
                f"{name}: what its consumers read is not finite on the calibration batches; does the model overflow, "
                "or do the batches hold NaN?"
            ) from error
        raise


def _first(batches: Iterable[Any]) -> Any:
    """The first batch.

    Raises:
        FitError: there is none.
        SiteError: the batches can be read only once.
    """
    for batch in reiterable(batches):
        return batch
    raise FitError("no batches are too little to calibrate on; give a few hundred samples")


def _check_call(dense: nn.Module, inputs: Inputs) -> None:
    """Check that the model takes such inputs.

    Raises:
        SiteError: it does not.
    """
    try:
        with evaluating(dense):
            call(dense, to_device(inputs, model_device(dense)))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(inputs))
        raise SiteError(
            f"the model cannot be called with the first calibration batch ({given or 'no tensors'}): {error}. Give "
            "batches like the example inputs that the sites were found with, or say with inputs_of= how to read yours"
        ) from error


def _first_not_finite(dense: nn.Module, sites: Sites, calibration: Calibration) -> str:
    """The first site, in order of execution, whose hidden tensor is not finite on some batch; "" where all are."""
    found: list[str] = []
    handles = []
    for site in sites:

        def watch(_: nn.Module, given: Any, name: str = site.name) -> None:
            if not found and not all(bool(t.isfinite().all()) for t in tensors(given) if t.is_floating_point()):
                found.append(name)

        handles += [dense.get_submodule(m.name).register_forward_pre_hook(watch) for m in site.consumers]
    try:
        with evaluating(dense):
            for batch in calibration.batches:
                call(dense, to_device(calibration.inputs_of(batch), model_device(dense)))
                if found:
                    return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _identity(dense: nn.Module, sites: Sites, calibration: Calibration) -> dict[str, Any]:
    """What the result of a squeezing to given widths depends on."""
    options = {f.name: getattr(calibration, f.name) for f in fields(calibration)}
    plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str, type(None)))}
    return {
        "version": __version__,
        "weights": fingerprint(dense, sites),
        "sites": [site.name for site in sites],
        "data": from_first_process(lambda: digest(calibration.batches)),
        "options": plain,
    }


def narrowable(sites: Sites) -> Sites:
    """The sites whose channels can be kept one by one.

    Raises:
        SiteError: there is none; the error says why.
    """
    reasons = {site.name: _why_not(site) for site in sites}
    found = sites.select(lambda site: not reasons[site.name])
    if not found:
        told = "; ".join(f"{name}: {reason}" for name, reason in chain(reasons.items(), sites.skipped.items()))
        raise SiteError(f"the model has no site that can be made narrower{': ' if told else ''}{told}")
    return found


def _why_not(site: Site) -> str:
    if site.producer is None or site.kind in ("activation", "heads"):
        return "it has no hidden width"
    if site.flattened:
        return "its consumers read its pixels one by one (narrow it by other means)"
    if site.not_narrow:
        return site.not_narrow
    if any(m.groups > 1 for m in (*site.consumers, site.producer)):
        return "the channels of a grouped convolution cannot be kept one by one"
    first = site.consumers[0]
    shape = (first.kind == "conv2d", first.kernel, first.stride, first.padding, first.dilation)
    if any((c.kind == "conv2d", c.kernel, c.stride, c.padding, c.dilation) != shape for c in site.consumers):
        return "its consumers read the hidden tensor in different ways"
    return ""


@dataclass
class _Clock:
    """What was timed: the model as it is, and its sites."""

    seconds: float = 0.0
    sites: dict[str, Latency] = field(default_factory=dict)


@dataclass
class _Squeeze:
    """One squeezing of one model.

    Attributes:
        dense: the model as it is.
        sites: that may be squeezed.
        sweep: squeezes to given widths.
        round_to, uniform: as for `squeeze`.
        inputs: what latencies are measured on.
        trust: what part of the time that single sites save the whole model saves.
        clock: what was timed.
        saved: parameters and MACs that a site's width saves, as far as they were counted.
    """

    dense: nn.Module
    sites: Sites
    sweep: Sweep
    round_to: int
    uniform: bool
    inputs: Inputs
    trust: float = 1.0
    clock: _Clock = field(default_factory=_Clock)
    saved: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def best(self, target: Target, score: Score | None) -> Plan:
        """The better of equal and allocated widths, judged with the consumers fitted only; or equal ones, if asked."""
        choices = [replace(self, uniform=True).widths(target)]
        if not self.uniform:
            choices.append(self.widths(target))
        if len(choices) == 2 and choices[0] != choices[1]:
            judge = self.likeness if score is None else score
            draft = self.sweep.without_producers()
            choices.sort(key=lambda widths: judge(draft.plan(widths)[1]))
        return self.sweep.plan(choices[-1])[0]

    def within(self, target: Target, score: Score) -> Plan:
        """The smallest plan found by bisection whose score is not below the floor."""
        floor = target.floor(score(self.dense))
        low, high = 0.0, 1.0
        best: Plan | None = None
        reached = float("-inf")
        for _ in range(_TRIALS):
            share = (low + high) / 2
            try:
                plan, small = self.sweep.plan(self.widths(Target("params", "share", share)))
            except TargetError:
                low = share
                continue
            reached = score(small)
            if reached >= floor:
                best, high = plan, share
            else:
                low = share
        if best is None:
            raise TargetError(
                f"the target {target} allows a score of {floor:.4g}, and with {high:.1%} of the parameters it is "
                f"{reached:.4g}. Allow more loss, or calibrate on more data"
            )
        return best

    def widths(self, target: Target) -> dict[str, int]:
        """How many channels each site keeps; 0 for a full collapse.

        Raises:
            TargetError: no widths meet the target, or nothing has to be done for it.
        """
        if target.unit != "latency":
            return self._allocated(target)
        if not self.uniform:
            _ = self.sweep.errors  # all processes take part in this
        return from_first_process(lambda: self._timed_widths(target))

    def _timed_widths(self, target: Target) -> dict[str, int]:
        """Widths whose latency, measured of the whole model, meets the target."""
        before = self._before(target)
        limit = target.limit(before)
        best: tuple[float, dict[str, int]] | None = None
        fastest = self.dense_seconds
        for timing in range(_TIMINGS):
            try:
                found = self._allocated(target)
            except TargetError:
                if timing == 0:
                    raise
                break
            seconds = self.timed(found)
            fastest = min(fastest, seconds)
            if seconds <= limit and (best is None or seconds > best[0]):
                best = (seconds, found)
            if _CLOSE * limit <= seconds <= limit:
                break
            hoped = self.dense_seconds - self._predicted(found)
            saved = self.dense_seconds - seconds
            self.trust = 0.99 * min(max(saved / hoped, _LEAST_TRUST), 1 / _LEAST_TRUST)
        if best is None:
            raise TargetError(
                f"the target {target} asks for {limit * 1e3:.3g} ms, and the model takes "
                f"{self.dense_seconds * 1e3:.3g} ms; of the plans that were timed the fastest takes "
                f"{fastest * 1e3:.3g} ms. Ask for less, or allow more sites"
            )
        return best[1]

    def _allocated(self, target: Target) -> dict[str, int]:
        """The same as `widths`, by counted cost or by the latencies of single sites."""
        before = self._before(target)
        widths = {site.name: site.width for site in self.sites}

        def met(chosen: Mapping[str, int]) -> bool:
            return target.met(before, self._after(before, chosen))

        try:
            if self.uniform:
                found = in_proportion(widths, met, self.round_to)
            else:
                menus = self._menus(target)
                chosen = allocate(menus, lambda choices: met({name: c.width for name, c in choices.items()}))
                found = {name: choice.width for name, choice in chosen.items()}
        except TargetError as error:
            smallest = {n: min(w, self.round_to) for n, w in widths.items()}
            least = target.amount_of(self._after(before, smallest))
            raise TargetError(
                f"the target {target} asks for {target.limit(before) / target.amount_of(before):.1%} of the model's "
                f"{target.unit}; with {self.round_to} channels at each of the {len(widths)} sites, "
                f"{least / target.amount_of(before):.1%} would remain. Ask for less, or allow more sites"
            ) from error
        if target.amount_of(self._after(before, found)) >= target.amount_of(before):
            raise TargetError(
                f"the target {target} is met by the model as it is ({target.amount_of(before):.4g} {target.unit}): "
                "no plan is cheaper in what was asked for"
            )
        return found

    def timed(self, widths: Mapping[str, int]) -> float:
        """Seconds of the whole model at these widths, by its ratio to the dense model in turns."""
        small = narrowed_copy(self.dense, self.sites, widths, paths=self.sweep.calibration.paths > 0)
        models = {"dense": self.dense, "small": small}
        found = compare(models, self.inputs, rounds=_TIMED_ROUNDS)["small"]
        wanted = round((found.ratio_spread / found.ratio / _PRECISION) ** 2)
        affordable = round(_TIMED_SECONDS / (2 * max(self.dense_seconds, _ROUND_SECONDS)))
        if (rounds := min(wanted, affordable)) > _TIMED_ROUNDS:
            found = compare(models, self.inputs, rounds=rounds)["small"]
        return found.ratio * self.dense_seconds

    @property
    def dense_seconds(self) -> float:
        """Seconds of the whole model as it is."""
        if not self.clock.seconds:
            self.clock.seconds = compare({"dense": self.dense}, self.inputs, rounds=_TIMED_ROUNDS)["dense"].latency
        return self.clock.seconds

    @property
    def latencies(self) -> dict[str, Latency]:
        """Of the sites, as parts of the whole model's."""
        if not self.clock.sites:
            merged = [s.name for s in self.sites if self.sweep.calibration.collapse and may_collapse(s)]
            self.clock.sites = site_latencies(
                self.dense, self.sites, self.inputs, round_to=self.round_to, collapse=merged
            )
        return self.clock.sites

    def _predicted(self, widths: Mapping[str, int]) -> float:
        """Seconds of the whole model at these widths, from the sites' latencies."""
        saved = sum(self.latencies[s.name].part - self.latencies[s.name].at(widths[s.name]) for s in self.sites)
        return self.dense_seconds * (1 - saved)

    def likeness(self, small: nn.Module) -> float:
        """How like the dense network's its output is, on some of the batches: minus the mean divergence."""
        batches = self.sweep.calibration.batches
        step = max(1, len(batches) // _JUDGED) if isinstance(batches, Sized) else 1
        total, count = 0.0, 0.0
        with evaluating(self.dense), evaluating(small):
            for batch in islice(batches, 0, _JUDGED * step, step):
                theirs, divergence = self.sweep.calibration.divergence(self.dense, small, batch)
                total, count = total + divergence, count + theirs
        total, count = summed_over_processes(total, count)
        return -total / max(1, count)

    def _menus(self, target: Target) -> dict[str, list[Choice]]:
        menus = {}
        for site in self.sites:
            curve = self.sweep.errors[site.name]
            widths = sorted({w for w in curve if w % self.round_to == 0 or w == site.width})
            menus[site.name] = [Choice(w, self._site_cost(site, w, target), curve[w]) for w in widths]
        return menus

    def _site_cost(self, site: Site, width: int, target: Target) -> float:
        if target.unit == "latency":
            return self.latencies[site.name].at(width)
        params, macs = self._saved_at(site, width)
        return site.macs - macs if target.unit == "macs" else site.params - params

    def _saved_at(self, site: Site, width: int) -> tuple[int, int]:
        """Parameters and MACs that this width alone saves."""
        if (site.name, width) not in self.saved:
            entry = None if width == site.width else stand_in(site, width)
            saved = (0, 0) if entry is None else (site.params - entry.params_after, site.macs - entry.macs_after)
            self.saved[site.name, width] = saved
        return self.saved[site.name, width]

    def _saved(self, widths: Mapping[str, int]) -> tuple[int, int]:
        """Parameters and MACs that these widths save together."""
        consumers = {m.name for site in self.sites for m in site.consumers}
        if any(m.name in consumers for site in self.sites for m in site.maps[: -len(site.consumers)]):
            plan = Plan(tuple(stand_in(s, widths[s.name]) for s in self.sites if widths[s.name] != s.width))
            return plan.params_saved, plan.macs_saved
        each = [self._saved_at(site, widths[site.name]) for site in self.sites]
        return sum(params for params, _ in each), sum(macs for _, macs in each)

    def _before(self, target: Target) -> Cost:
        tensors = {id(t): t for t in chain(self.dense.parameters(), self.dense.buffers())}.values()
        params = {id(t): t for t in self.dense.parameters()}.values()
        memory = sum(t.numel() * t.element_size() for t in tensors)
        seconds = self.dense_seconds if target.unit == "latency" else None
        return Cost(sum(t.numel() for t in params), self.sites.macs, memory, seconds)

    def _after(self, before: Cost, widths: Mapping[str, int]) -> Cost:
        params, macs = self._saved(widths)
        wide = next(self.dense.parameters()).element_size()
        # a BatchNorm's running mean and variance go with its channels
        statistics = sum(2 * site.norms * (site.width - widths[site.name]) for site in self.sites)
        seconds = None
        if before.latency is not None:
            seconds = before.latency - self.trust * (before.latency - self._predicted(widths))
        return Cost(before.params - params, before.macs - macs, before.memory - wide * (params + statistics), seconds)
