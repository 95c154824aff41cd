"""LayerCollapse: train activations until they are linear, so that the layers around them merge.

    method = sh.LayerCollapse(model, sites)
    method.fit(loader, task_loss, recipe, stages=3)             # or any training loop, see methods/base.py
    small = sh.apply(model, method.plan(), example_inputs)

Reference: LayerCollapse, arXiv 2311.17943.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallower.calibrating.moments import Moments, collect
from shallower.core.inputs import InputsOf, MaskOf, default_inputs_of, reiterable
from shallower.core.processes import agreed_result
from shallower.errors import MethodError
from shallower.methods.base import Method, activation_of, bound_plan, detach_from, linearisable
from shallower.methods.collapsing.fates import Fates, unsharded
from shallower.methods.collapsing.sensitivity import costs_of
from shallower.methods.collapsing.stages import StageResult, Stages, check_tolerance
from shallower.modules import attachment
from shallower.modules.activations import SlopeActivation
from shallower.planning.entries import Entry, Family
from shallower.planning.paying import paying
from shallower.planning.plan import Plan
from shallower.sites import Site, Sites
from shallower.training.loop import Loss, Score
from shallower.training.recipe import Checkpoint, Recipe
from shallower.training.rounds import Rounds, Training

Granularity = Literal["site", "channel"]
AffineRule = Literal["best", "calibration", "gaussian", "unit"]

_PROBE = 8
"""Batches on which the sensitivity is measured."""


class LayerCollapse(Method):
    """Replaces f by a x + (1 - a) f(x) and pulls the slope a to 1 by the penalty strength * sum (1 - a)^2.

        method = sh.LayerCollapse(model, sh.find_sites(model, example_inputs))
        method.fit(loader, task_loss, sh.Recipe(epochs=3, lr=5e-5))
        small = sh.apply(model, method.plan(), example_inputs)

    Attaches to the model at once; at a = 0 the model computes what it computed. Sites at which no channel may become
    linear are left alone, and so are those whose collapse makes no layer cheaper (two 3x3 convolutions, for instance)
    unless they are named in `include`; `method.left_out` says which and why.

    A slope that has become exactly 1 (by `settle`, or because of `arrive_in`) stays there as long as `before_step` and
    `after_step` are called.

    Args:
        model: to attach to.
        sites: where; a gated site's gate goes towards the constant 1.
        include: names or patterns of sites that become linear even where that saves nothing; "*" for all.
        strength: of the penalty. Per channel the penalty is the mean over the channels, so that strength keeps its
            meaning.
        family: "blend" keeps the trained f at first; "prelu" is the paper's max(x, 0) + a min(x, 0), from a = 0.01.
        granularity: one slope for each site, or for each channel.
        decoupled: as AdamW decouples weight decay: a <- a - 2 lr strength (a - 1) in `after_step`, and no penalty in
            the loss; the paper's choice for language models.
        slope_lr: learning rate of the slopes, if it is not the model's. With AdamW a slope moves by at most about its
            learning rate in a step, so that 5e-5 would need 20,000 steps from 0 to 1.
            SGD has no such bound: at a network's 0.05 the task's gradient makes the slopes jump, and `arrive_in`
            keeps every jump towards 1; 1e-3 worked there.
        arrive_in: steps after which every slope is guaranteed to be 1: each step moves a slope by at least
            1 / arrive_in towards 1. None leaves it to the penalty. `fit` sets it for each stage, `schedule` where it is
            None.

    Raises:
        MethodError: a value is out of its range, the sites are another model's, no site can become linear or none pays,
            nothing fits a name in `include`, or a method is attached already.
        SiteError: an activation cannot be exchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        strength: float = 0.5,
        *,
        family: Family = "blend",
        granularity: Granularity = "site",
        decoupled: bool = False,
        slope_lr: float | None = None,
        arrive_in: int | None = None,
        include: str | Iterable[str] = (),
    ) -> None:
        if not 0 <= strength < math.inf:
            raise MethodError(f"strength={strength!r}: pass a finite number that is not negative")
        if slope_lr is not None and not 0 < slope_lr < math.inf:
            raise MethodError(f"slope_lr={slope_lr!r}: pass a positive number, or None")
        if arrive_in is not None and not 1 <= arrive_in < math.inf:
            raise MethodError(f"arrive_in={arrive_in!r}: pass a number of steps, at least 1, or None")
        if family not in ("blend", "prelu") or granularity not in ("site", "channel"):
            raise MethodError(
                f"family={family!r}, granularity={granularity!r}: the families are 'blend' and 'prelu', the "
                "granularities 'site' and 'channel'"
            )
        super().__init__(model, _worthwhile(sites, [include] if isinstance(include, str) else list(include)))
        self.left_out = {site.name: self.sites.skipped[site.name] for site in sites if site not in self.sites}
        self.strength = strength
        self.family = family
        self.granularity = granularity
        self.decoupled = decoupled
        self.slope_lr = slope_lr
        self.arrive_in = arrive_in
        self.activations: dict[str, SlopeActivation] = {}
        self.active: tuple[str, ...] = self.sites.names
        self._before: dict[str, Tensor] = {}
        try:
            for site in self.sites:
                self.activations[site.name] = self._attach(site)
        except Exception:
            self.detach()
            raise

    def _attach(self, site: Site) -> SlopeActivation:
        if site.bridge.gated and self.family == "prelu":
            raise MethodError(f"{site.name}: a gate has no PReLU form; use family='blend' or leave gated sites out")
        weight = _weight_near(self.model, site)

        def slope_of(f: nn.Module) -> SlopeActivation:
            module = SlopeActivation(
                f,
                width=site.width or None if self.granularity == "channel" else None,
                family=self.family,
                target="one" if site.bridge.gated else "identity",
                channels_first=site.bridge.image,
            )
            return module.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

        module = attachment.attach(self.model, activation_of(site), slope_of)
        assert isinstance(module, SlopeActivation)
        return module

    def detach(self) -> None:
        """Remove the slope activations; the trained weights stay as they are."""
        self.unfollow()
        detach_from(self.model, self.sites, self.activations)
        self.activations = {}
        self.active = ()

    def slopes(self) -> dict[str, Tensor]:
        """The current slopes by site: detached copies of shape (1,) or (n,)."""
        return {name: unsharded(module.slope).detach().clone() for name, module in self.activations.items()}

    # what a training loop asks

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """As `Method.param_groups`, and a last group for the slopes: no weight decay, `slope_lr` if given."""
        groups = super().param_groups(weight_decay)
        trained = filter(attrgetter("requires_grad"), self.undecayed())
        slopes: dict[str, Any] = {"params": list(trained), "weight_decay": 0.0}
        if self.slope_lr is not None:
            slopes["lr"] = self.slope_lr
        return [group for group in (*groups, slopes) if group["params"]]

    def undecayed(self) -> list[nn.Parameter]:
        """The slopes: weight decay would pull them to 0."""
        return list(map(attrgetter("slope"), self.activations.values()))

    def schedule(self, steps: int) -> None:
        """Bring every slope to 1 within so many steps, unless the method was constructed with `arrive_in`."""
        if self.arrive_in is None:
            self.arrive_in = max(1, steps)

    def metrics(self) -> dict[str, float]:
        """The mean slope, and how many sites are linear."""
        means = list(map(torch.mean, self.slopes().values()))
        if not means:
            return {}
        return {"shallower/slope": float(torch.stack(means).mean()), "shallower/linear": len(self.collapsed())}

    def penalty(self) -> Tensor:
        """strength * sum over active sites of (1 - a)^2, per channel the mean; 0 where the penalty is decoupled."""
        if self.decoupled or not self.active:
            return super().penalty()
        distances = map(self.distance, map(unsharded, self._active_slopes()))
        return self.strength * torch.stack(list(map(torch.mean, distances))).sum()

    def distance(self, slope: Tensor) -> Tensor:
        """What the penalty measures of each slope: (1 - a)^2."""
        return (1 - slope).square()

    def gradient(self, slope: Tensor) -> Tensor:
        """The derivative of `distance`: 2 (a - 1)."""
        return 2 * (slope - 1)

    def add_penalty_grad(self) -> None:
        """After `backward()`, adds the gradient of the penalty to that of each active slope.

        For loops whose loss should stay the task's own. With a gradient scaler, call it after `unscale_`.
        """
        if self.decoupled:
            return
        for slope in self._active_slopes():
            if slope.requires_grad:
                gradient = self.gradient(slope.detach()) * (self.strength / slope.numel())
                slope.grad = gradient if slope.grad is None else slope.grad.add_(gradient)

    def before_step(self) -> None:
        """Record the slopes, so that `after_step` knows how far they moved."""
        self._before = {name: module.slope.detach().clone() for name, module in self.activations.items()}

    @torch.no_grad()
    def after_step(self, lr: float | None = None) -> None:
        """The decoupled penalty, `arrive_in`, and slopes that are exactly 1 stay so.

        Args:
            lr: the learning rate of the step, which only the decoupled penalty needs; by default that of the optimizer
                given to `follow`.

        Raises:
            MethodError: the penalty is decoupled and the rate is not known.
        """
        if self.decoupled:
            rate = self.rate(lr)
            for slope in self._active_slopes():
                if slope.requires_grad:
                    slope.sub_(slope - 1, alpha=2 * rate * self.strength)
        for name, before in self._before.items():
            slope = self.activations[name].slope
            if self.arrive_in is not None and name in self.active:
                slope.copy_(torch.maximum(slope, before + 1 / self.arrive_in).clamp_(max=1))
            slope.copy_(torch.where(before == 1, before, slope))
        self._before = {}

    def _active_slopes(self) -> Iterator[nn.Parameter]:
        for name in self.active:
            yield self.activations[name].slope

    # what comes of it

    def collapsed(self) -> tuple[str, ...]:
        """Names of the sites whose slopes are exactly 1 now."""
        return tuple(name for name, slope in self.slopes().items() if bool((slope == 1).all()))

    @torch.no_grad()
    def settle(self, tolerance: float = 0.05) -> tuple[str, ...]:
        """Set active slopes with |1 - a| < tolerance to exactly 1 for good; a site whose slopes are all 1 is frozen.

        Returns:
            The names of all sites whose slopes are exactly 1 now.
        """
        check_tolerance(tolerance)
        for slope in self._active_slopes():
            slope.copy_(torch.where((1 - slope).abs() < tolerance, torch.ones_like(slope), slope))
        done = self.collapsed()
        for name in done:
            self.activations[name].slope.requires_grad_(False)
        return done

    def plan(
        self,
        tolerance: float = 0.05,
        affine: AffineRule = "best",
        *,
        batches: Iterable[Any] | None = None,
        inputs_of: InputsOf = default_inputs_of,
        mask_of: MaskOf | None = None,
    ) -> Plan:
        """Channels with |1 - a| < tolerance become linear, the others keep their slope activation.

        Of several processes all call it: what is measured on the batches of each is added up.

        Args:
            tolerance: 0.05 in the paper. A site whose slopes are all 0 (blend) is not in the plan: it is still f.
            affine: which line replaces the almost linear activation.
                "unit": slope exactly 1, as in the paper.
                "gaussian": the closest to it under the BatchNorm before f, by which f's input is normal with
                    mean beta and deviation |gamma|; exactly 1 at sites without one.
                "calibration": the closest on `batches`.
                "best": "calibration" where batches are given, "gaussian" otherwise.
            batches: for "calibration".
            inputs_of: picks the model's inputs out of a batch.
            mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.

        Raises:
            MethodError: the method is detached, a value is out of its range, batches are needed and missing, or an
                activation place has neither arrived nor stayed as it was.
        """
        check_tolerance(tolerance)
        if affine not in ("best", "calibration", "gaussian", "unit"):
            raise MethodError(f"affine={affine!r}: choose best, calibration, gaussian or unit")
        if affine == "calibration" and batches is None:
            raise MethodError("affine='calibration' needs batches= to calibrate on")
        if not self.activations:
            raise MethodError("the method is detached, and its slopes are gone: make the plan before detach()")
        moments: Mapping[str, Moments] = {}
        if batches is not None and affine in ("best", "calibration"):
            collapsing = (site for site in self.sites if self._arrived(site, tolerance))
            moments = collect(self.model, collapsing, batches, inputs_of=inputs_of, mask_of=mask_of)
        fates = Fates(self.model, tolerance, affine == "unit", moments)
        entries: list[Entry] = []
        for site in self.sites:
            entry = fates.entry(site, self.activations[site.name])
            if entry is not None:
                entries.append(entry)
        return bound_plan(self.model, entries, "layer-collapse")

    def _arrived(self, site: Site, tolerance: float) -> bool:
        """Whether any channel of the site becomes linear."""
        slope = unsharded(self.activations[site.name].slope)
        return bool(((1 - slope).abs() < tolerance).any())

    # in stages

    def sensitivity(
        self,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        score: Score | None = None,
        inputs_of: InputsOf = default_inputs_of,
    ) -> dict[str, float]:
        """What each site alone costs if it becomes linear now, the others staying as they are.

            sorted(costs := method.sensitivity(batches), key=costs.get)

        The cost is the fall of the score if `score` is given, else the rise of the loss if `loss` is given, else the
        change of the model's output: KL divergence of logits, relative squared error otherwise; means over the batches.

        Args:
            batches: a few; not read where `score` is given.
            loss: of the model and a batch.
            score: of the model, higher is better.
            inputs_of: picks the model's inputs out of a batch, where neither is given.

        Raises:
            MethodError: there are no batches.
        """
        changes = {name: partial(_made_linear, module.slope) for name, module in self.activations.items()}
        return costs_of(self.model, changes, batches, loss=loss, score=score, inputs_of=inputs_of)

    def fit(
        self,
        batches: Iterable[Any],
        loss: Loss,
        recipe: Recipe,
        stages: Stages | int | Sequence[Sequence[str]] | None = None,
        *,
        score: Score | None = None,
        floor: float | None = None,
        checkpoint: Checkpoint | Path | str | None = None,
        cpu: bool = False,
    ) -> list[StageResult]:
        """Train in stages: each pulls the slopes of a few more sites to 1, and sets those that are close to exactly 1.

            stages = method.fit(loader, task_loss, sh.Recipe(epochs=3, lr=5e-5), stages=3, checkpoint="run/")

        The slopes of later sites are frozen meanwhile; those of earlier sites that did not arrive go on.

        Args:
            batches, loss, recipe: as `train` takes them; the recipe is that of every stage.
            stages: how the sites are divided, or only into how many stages, or the names of the sites of each; None:
                one site after another.
            score: of the model, higher is better, taken after each stage.
            floor: lowest score accepted. A stage that ends below it is undone and is the last.
            checkpoint: a folder, or a `Checkpoint` of one to write it also within an epoch. After an interruption the
                same call continues where it was.
            cpu: stay on the CPU.

        Returns:
            The stages, in order.

        Raises:
            MethodError: the stages or the order do not fit the sites, floor is given without score, or the checkpoint
                is of another run.
            TrainingError: see `train`.
        """
        options = Stages.of(stages)
        training = Training(batches, loss, recipe, score, floor, checkpoint, cpu)
        rounds = Rounds("stage", StageResult, self, training, self._identity(options))
        with rounds, self._scheduled(options, rounds):
            groups = self._groups(options, rounds)
            while len(rounds.finished) < len(groups) and not rounds.over:
                number = len(rounds.finished) + 1
                slopes: dict[str, float] = {}
                self._begin(groups[:number])
                end = partial(self._end, slopes, options.tolerance)
                outcome = rounds.train(f"stage {number}/{len(groups)}", end=end)
                rounds.finish(StageResult(tuple(groups[number - 1]), self.collapsed(), slopes, **vars(outcome)))
        return rounds.finished

    def _identity(self, options: Stages) -> dict[str, Any]:
        """What a run that continues has in common with the one that began; the order of the sites is kept in it."""
        names = ("strength", "family", "granularity", "decoupled", "slope_lr")
        own = {name: getattr(self, name) for name in names}
        return {**own, "sites": list(self.activations), "tolerance": options.tolerance, "arrive": options.arrive}

    def _groups(self, options: Stages, rounds: Rounds[StageResult]) -> list[list[str]]:
        """The sites of each stage, kept at once: a run that continues might measure another order."""
        names = list(self.activations)
        if not rounds.chosen:
            probe = islice(reiterable(rounds.training.batches), _PROBE) if options.probe is None else options.probe

            def costs() -> dict[str, float]:
                return agreed_result(self.sensitivity, list(probe), loss=rounds.training.loss)

            rounds.chosen = {"groups": options.divided(options.ordered(names, costs))}
            rounds.keep()
        groups: list[list[str]] = rounds.chosen["groups"]
        return groups

    @contextmanager
    def _scheduled(self, options: Stages, rounds: Rounds[StageResult]) -> Iterator[None]:
        """`arrive_in` as the stages need it; afterwards as it was, with the slopes of all stages active."""
        own = self.arrive_in
        self.arrive_in = None
        if options.arrive is not None:
            self.schedule(round(options.arrive * rounds.steps))
        try:
            yield
        finally:
            self.arrive_in = own
            self._begin(rounds.chosen.get("groups", [self.sites.names]))

    def _end(self, slopes: dict[str, float], tolerance: float) -> None:
        """Record the slopes at the end of a stage, and set those within the tolerance to 1."""
        for name, slope in self.slopes().items():
            slopes[name] = float(slope.mean())
        self.settle(tolerance)

    def _begin(self, groups: Iterable[Sequence[str]]) -> None:
        """Make the slopes of `groups` active and freeze all others; those that are settled stay frozen."""
        settled = set(self.collapsed())
        self.active = tuple(name for group in groups for name in group if name not in settled)
        for name, module in self.activations.items():
            module.slope.requires_grad_(name in self.active)


@contextmanager
def _made_linear(slope: Tensor) -> Iterator[None]:
    """The slope at 1 for the length of the context."""
    before = slope.detach().clone()
    with torch.no_grad():
        slope.fill_(1)
    try:
        yield
    finally:
        with torch.no_grad():
            slope.copy_(before)


def _worthwhile(sites: Sites, include: Sequence[str]) -> Sites:
    """Those sites that may become linear and either pay or are asked for; the reasons of the others go to `skipped`.

    Raises:
        MethodError: there is none, or nothing that may become linear has a name that was asked for.
    """
    linear = linearisable(sites)
    kept, reasons = paying(linear)
    chosen = {site.name for site in kept}
    for name in include:
        asked = linear.select(name).names
        if not asked:
            raise MethodError(f"include={name!r}: there is no site of that name that may become linear")
        chosen.update(asked)
    left = {name: reason for name, reason in reasons.items() if name not in chosen}
    if not chosen:
        shown = "; ".join(f"{name}: {reason}" for name, reason in islice(left.items(), 3))
        raise MethodError(f"no site pays ({shown}). With include='*' the activations go all the same")
    return linear.only((site for site in linear if site.name in chosen), left)


def _weight_near(model: nn.Module, site: Site) -> Tensor:
    """A weight that has the device and the dtype of the site."""
    near = model if site.producer is None else model.get_submodule(site.producer.name)
    return next(near.parameters(), torch.zeros(1))
