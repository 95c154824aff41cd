"""Calibrated squeezing: the best narrower network that a few hundred samples can find, without training.

For each site, in order: choose the channels from which least squares predicts best what the consumers should give,
weighted by what the model's output makes of it, and fit the consumers anew. Each site is calibrated on the network
whose earlier sites are squeezed already, towards what the dense network does there. How many channels each site keeps
follows from the sites' curves of error against cost, or is the same share everywhere, whichever does better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from shallower.allocation import Choice, allocate, in_proportion
from shallower.attachment import attached_places, detached_copy
from shallower.budget import Cost, Target
from shallower.calibration import Centred, SiteGrams, collect_grams
from shallower.errors import FitError, MethodError, SiteError, TargetError
from shallower.fingerprints import fingerprint
from shallower.fisher import OutputOf, default_output_of, output_metrics
from shallower.forms import steps
from shallower.inputs import InputsOf, call, default_inputs_of, model_device, reiterable, to_device
from shallower.plan import Entry, Fate, Fit, Plan
from shallower.selection import columns_of, eliminate, fit_error, ridge_fit
from shallower.sites import Site, Sites
from shallower.statistics import MaskOf, default_mask_of, evaluating
from shallower.surgery import operate

Score = Callable[[nn.Module], float]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Ridges that held-out rows choose from, relative to the mean diagonal."""

_SELECTION_RIDGE = 1e-4
_DAMPING = 1e-2
_MEMORY = 1 << 30
"""Bytes of Gram matrices that are held at a time while curves are made."""

_TRIALS = 6
_JUDGED = 8
"""Batches on which allocated and equal widths are compared."""


@dataclass(frozen=True)
class Calibration:
    """What squeezing is done with.

    Attributes:
        batches: iterated several times.
        compensation: how much of the error of the residual stream a site makes up for, 0 to 1.
        sensitivity: weight a site's outputs by what the model's output makes of them.
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

    def metrics(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
        """What a change at each consumer's output does to the model's output; empty without sensitivity."""
        if not self.sensitivity:
            return {}
        names = [m.name for site in sites for m in site.consumers]
        return output_metrics(
            model,
            names,
            self.batches,
            inputs_of=self.inputs_of,
            mask_of=self.mask_of,
            output_of=self.output_of,
            logits=self.logits,
            seed=self.seed,
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
        self, dense: nn.Module, small: nn.Module | None, sites: Sequence[Site], with_inputs: bool
    ) -> dict[str, SiteGrams]:
        """Gram matrices of these sites."""
        return collect_grams(
            dense,
            small,
            sites,
            self.batches,
            compensation=0.0 if small is None else self.compensation,
            with_inputs=with_inputs,
            inputs_of=self.inputs_of,
            mask_of=self.mask_of,
        )


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
        model: in the state it is to be used in; it is not changed.
        sites: of this model, or a selection of them.
        batches: a few hundred samples of what the model is used on, labels are not needed; iterated several times.
        target: `params:`, `macs:`, `memory:`, or `drop:`, which needs `score`; see `budget.Target`.
        score: quality of a model, higher is better. Needed for `drop:`. Widths allocated by the sites' curves of error
            and equal widths are both tried, and the better one by this score is taken; without a score, the one whose
            output differs less from the model's on the batches.
        uniform: keep the same share of every site's channels, so that a stock class can express the result.
        round_to: widths are multiples of this.
        compensation: how much of the error that earlier sites left in the residual stream a site makes up for, 0 to 1.
        sensitivity: weight outputs by what the model's output makes of them (one backward pass over the batches).
        collapse: allow a site to become one linear map, where that is the better buy; not with `uniform`.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        output_of: picks the output that matters out of what the model returns.
        logits: whether that output is logits, whose distribution matters; by default, whether the model names it so.
        seed: of the random projections.

    Returns:
        A plan with fitted consumers; made for these weights.

    Raises:
        SiteError: no site can be made narrower.
        TargetError: the target cannot be met; the error says what can.
        FitError: the calibration data are too few or not finite; the error names the site.
        MethodError: an option is out of range, or a `drop:` target comes without `score`.
    """
    if not 0 <= compensation <= 1 or round_to < 1:
        raise MethodError("compensation is a number from 0 to 1, and round_to at least 1")
    goal = Target.parse(target) if isinstance(target, str) else target
    reiterable(batches)
    squeezable = narrowable(sites)
    calibration = Calibration(
        batches, compensation, sensitivity, collapse and not uniform, inputs_of, mask_of, output_of, logits, seed
    )
    dense = detached_copy(model) if attached_places(model) else model
    work = _Squeeze(dense, squeezable, calibration, round_to, uniform)
    if goal.unit == "drop":
        if score is None:
            raise MethodError(f"the target {goal} needs score=, a function from a model to its quality")
        return work.within(goal, score)
    if goal.unit == "latency":
        raise MethodError(f"the target {goal}: squeezing counts params:, macs: and memory:, or is steered by drop:")
    choices = [replace(work, uniform=True).widths(goal)]
    if not uniform:
        choices.append(work.widths(goal))
    if len(choices) == 1 or choices[0] == choices[1]:
        return work.plan(choices[0])[0]
    judge = work.likeness if score is None else score
    return max((work.plan(widths) for widths in choices), key=lambda made: judge(made[1]))[0]


def narrowable(sites: Sites) -> Sites:
    """The sites whose channels can be kept one by one.

    Raises:
        SiteError: there is none; the error says why.
    """
    reasons = {site.name: _why_not(site) for site in sites}
    found = sites.select(lambda site: not reasons[site.name])
    if not found.items:
        told = "; ".join(f"{name}: {reason}" for name, reason in chain(reasons.items(), sites.skipped.items()))
        raise SiteError(f"the model has no site that can be made narrower{': ' if told else ''}{told}")
    return found


def _why_not(site: Site) -> str:
    if site.producer is None or site.kind in ("activation", "heads"):
        return "it has no hidden width"
    if any(m.groups > 1 for m in site.maps):
        return "the channels of a grouped convolution cannot be kept one by one"
    first = site.consumers[0]
    shape = (first.kind == "conv2d", first.kernel, first.stride, first.padding, first.dilation)
    if any((c.kind == "conv2d", c.kernel, c.stride, c.padding, c.dilation) != shape for c in site.consumers):
        return "its consumers read the hidden tensor in different ways"
    return ""


@dataclass
class _Squeeze:
    """One squeezing of one model."""

    dense: nn.Module
    sites: Sites
    calibration: Calibration
    round_to: int
    uniform: bool
    _metrics: dict[str, Tensor] | None = None
    _errors: dict[str, dict[int, float]] | None = None

    def within(self, target: Target, score: Score) -> Plan:
        """The smallest plan found by bisection whose score is not below the floor."""
        floor = target.floor(score(self.dense))
        low, high = 0.0, 1.0
        best: Plan | None = None
        reached = float("-inf")
        for _ in range(_TRIALS):
            share = (low + high) / 2
            try:
                plan, small = self.plan(self.widths(Target("params", "share", share)))
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
        """How many channels each site keeps; 0 for a full collapse."""
        before = self._before()
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
            smallest = {n: w if self.uniform else min(w, self.round_to) for n, w in widths.items()}
            least = target.amount_of(self._after(before, {n: min(w, self.round_to) for n, w in smallest.items()}))
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

    def plan(self, widths: Mapping[str, int]) -> tuple[Plan, nn.Module]:
        """Squeeze to these widths: the plan, and the network it makes."""
        metrics = self.metrics
        small = detached_copy(self.dense)
        entries: list[Entry] = []
        for site in self.sites:
            width = widths[site.name]
            if width == site.width:
                continue
            grams = self.calibration.grams(self.dense, small, [site], with_inputs=width == 0)[site.name]
            metric = _metric(site, metrics, grams)
            try:
                entry = _collapsed(site, grams, metric) if width == 0 else _narrowed(site, grams, metric, width)
            except FitError as error:
                raise FitError(f"{site.name}: {error}") from error
            entries.append(entry)
            operate(small, next(step for step in steps(entries) if step.entry is entry))
        return Plan(tuple(entries), fingerprint(self.dense, [e.site for e in entries]), "squeeze"), small

    def likeness(self, small: nn.Module) -> float:
        """How like the dense network's its output is, on a few of the batches: minus the mean divergence."""
        total, count = 0.0, 0
        with evaluating(self.dense), evaluating(small):
            for batch in islice(self.calibration.batches, _JUDGED):
                theirs, divergence = self.calibration.divergence(self.dense, small, batch)
                total, count = total + divergence, count + theirs
        return -total / max(1, count)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the model's output makes of a change at each consumer's output."""
        if self._metrics is None:
            self._metrics = self.calibration.metrics(self.dense, self.sites)
        return self._metrics

    @property
    def errors(self) -> dict[str, dict[int, float]]:
        """For each site, the error at every width; at width 0, of a full collapse where that is possible."""
        if self._errors is None:
            self._errors = {}
            for group in _groups(self.sites):
                for name, grams in self.calibration.grams(self.dense, None, group, self.calibration.collapse).items():
                    self._errors[name] = self._curve(self.sites[name], grams)
        return self._errors

    def _curve(self, site: Site, grams: SiteGrams) -> dict[int, float]:
        moments = _moments(site, grams)
        metric = _metric(site, self.metrics, grams)
        taps = site.consumers[0].taps
        zy = moments.zy @ _root(metric)
        elimination = eliminate(moments.zz, zy, ridge=_SELECTION_RIDGE, keep=0, taps=taps)
        whole = elimination.error(0)
        positions = sum(m.positions for m in site.consumers) / len(site.consumers)
        scale = positions if self.calibration.sensitivity else 1.0
        curve = {k: scale * _damage(elimination.error(k), whole) for k in range(1, site.width + 1)}
        if grams.inputs is not None and _may_collapse(site):
            _, error = _best_ridge(site, grams.inputs, metric, None)
            curve[0] = scale * _damage(error, whole)
        return curve

    def _menus(self, target: Target) -> dict[str, list[Choice]]:
        menus = {}
        for site in self.sites:
            curve = self.errors[site.name]
            widths = sorted({w for w in curve if w % self.round_to == 0 or w == site.width})
            menus[site.name] = [Choice(w, self._site_cost(site, w, target), curve[w]) for w in widths]
        return menus

    def _site_cost(self, site: Site, width: int, target: Target) -> float:
        if width == site.width:
            return site.macs if target.unit == "macs" else site.params
        entry = _stub(site, width)
        return entry.macs_after if target.unit == "macs" else entry.params_after

    def _before(self) -> Cost:
        tensors = {id(t): t for t in chain(self.dense.parameters(), self.dense.buffers())}.values()
        params = {id(t): t for t in self.dense.parameters()}.values()
        memory = sum(t.numel() * t.element_size() for t in tensors)
        return Cost(sum(t.numel() for t in params), self.sites.macs, memory)

    def _after(self, before: Cost, widths: Mapping[str, int]) -> Cost:
        plan = Plan(tuple(_stub(s, widths[s.name]) for s in self.sites if widths[s.name] != s.width))
        wide = next(self.dense.parameters()).element_size()
        params = plan.params_saved
        return Cost(before.params - params, before.macs - plan.macs_saved, before.memory - wide * params)


def _stub(site: Site, width: int) -> Entry:
    """An entry that costs what a site with this width costs."""
    return Entry.collapse(site) if width == 0 else Entry.narrow(site, torch.arange(width))


def _may_collapse(site: Site) -> bool:
    return not site.not_linear and site.producer is not None and site.activation is not None and site.calls == 1


def _damage(error: float, whole: float) -> float:
    """An error as the sites' budgets see it: for small ones the error itself, without bound where all is lost.

    The second-order estimate is right for small errors only: a site that loses most of what it says costs more, and
    without this the knapsack takes all from a few sites.
    """
    return error / max(1 - error / whole, 1e-6) if whole > 0 else 0.0


def _intercept(site: Site) -> bool:
    """Whether the fit has an intercept: always at convolutions; elsewhere where the consumer has a bias to hold it.

    A bias that was not there would keep the stock class from loading the result.
    """
    return all(c.bias or c.kind != "linear" for c in site.consumers)


def _moments(site: Site, grams: SiteGrams) -> Centred:
    try:
        return grams.all.centred(_intercept(site))
    except FitError as error:
        raise FitError(f"{site.name}: {error}") from error


def _metric(site: Site, metrics: Mapping[str, Tensor], grams: SiteGrams) -> Tensor:
    """(d, d) float64, positive definite: the weight of errors at the consumers' outputs, one beside the other."""
    found = [metrics[m.name] for m in site.consumers if m.name in metrics]
    if len(found) < len(site.consumers) or all(bool((t == 0).all()) for t in found):
        moments = _moments(site, grams)
        scale = 1.0 / moments.yy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return scale * torch.eye(len(moments.yy), dtype=torch.float64, device=moments.yy.device)
    metric: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]
    return metric + _DAMPING * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)


def _root(metric: Tensor) -> Tensor:
    """Its symmetric square root."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def _narrowed(site: Site, grams: SiteGrams, metric: Tensor, width: int) -> Entry:
    """Keep this many channels, and fit the consumers to them."""
    moments = _moments(site, grams)
    taps = site.consumers[0].taps
    zy = moments.zy @ _root(metric)
    kept = eliminate(moments.zz, zy, ridge=_SELECTION_RIDGE, keep=width, taps=taps).kept(width)
    columns = columns_of(kept, taps)
    ridge, _ = _best_ridge(site, (grams.fit, grams.held), metric, columns)
    weight = ridge_fit(moments.zz[columns][:, columns], moments.zy[columns], ridge)
    bias = moments.mean_y - weight @ moments.mean_z[columns]
    weights, biases = _by_consumer(site, weight, bias, width)
    return Entry.narrow(site, kept.cpu(), fit=Fit(weights, biases))


def _collapsed(site: Site, grams: SiteGrams, metric: Tensor) -> Entry:
    """One linear map from what the producer reads to what the consumers should give."""
    if grams.inputs is None:
        raise FitError("a full collapse needs Gram matrices of what the producer reads")
    ridge, _ = _best_ridge(site, grams.inputs, metric, None)
    moments = (grams.inputs[0] + grams.inputs[1]).centred(_intercept(site))
    weight = ridge_fit(moments.zz, moments.zy, ridge)
    weights, biases = _by_consumer(site, weight, moments.mean_y - weight @ moments.mean_z, 0)
    n = site.width
    return Entry(
        site,
        torch.full((n,), int(Fate.LINEAR), dtype=torch.int8),
        torch.ones(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        fit=Fit((), biases, None, weights),
    )


def _best_ridge(site: Site, pair: tuple[Any, Any], metric: Tensor, columns: Tensor | None) -> tuple[float, float]:
    """The ridge with the least error on held-out rows, and that error."""
    intercept = _intercept(site)
    if pair[0].count < 2 or pair[1].count < 2:
        return RIDGES[-1], float("inf")
    fit, held = pair[0].centred(intercept), pair[1].centred(intercept)
    chosen = torch.arange(len(fit.zz), device=fit.zz.device) if columns is None else columns
    scale = metric.diagonal().sqrt()
    yy = float((held.yy * scale.square()).sum())
    best = (RIDGES[-1], float("inf"))
    for ridge in RIDGES:
        try:
            weight = ridge_fit(fit.zz[chosen][:, chosen], fit.zy[chosen], ridge)
        except FitError:
            continue
        error = fit_error(held.zz[chosen][:, chosen], held.zy[chosen] * scale, yy, scale[:, None] * weight)
        if error < best[1]:
            best = (ridge, error)
    return best


def _by_consumer(site: Site, weight: Tensor, bias: Tensor, width: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    sizes = [c.d_out for c in site.consumers]
    weights = []
    for c, part in zip(site.consumers, torch.split(weight.cpu(), sizes), strict=True):
        weights.append(part.reshape(c.d_out, width, *c.kernel) if c.kind == "conv2d" and width else part)
    biases = torch.split(bias.cpu(), sizes)
    return tuple(weights), tuple(b.clone() for b in biases)


def _groups(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites whose Gram matrices fit into memory together."""
    groups: list[list[Site]] = []
    room = 0
    for site in sites:
        columns = site.width * site.consumers[0].taps
        d_in = site.producer.d_in if site.producer is not None else 0
        size = 16 * (columns**2 + d_in**2)
        if not groups or size > room:
            groups.append([])
            room = _MEMORY
        groups[-1].append(site)
        room -= size
    return groups
