"""Till the Layers Collapse: whole sites become linear, a few at a time, where their activation does least.

A channel whose input is positive on average passes as it is, the others become 0, as in the paper. What tells how the
inputs lie is the BatchNorm in front of the activation, without data. Where there is none, statistics are measured, and
the line nearest to the activation takes its place.

Reference: TLC, arXiv 2412.15077. EASIER (arXiv 2404.18949) and NEPENTHE (arXiv 2404.16890) differ in the order: theirs
is that of the entropy of the signs of h, `criterion="entropy"`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.core.inputs import Inputs, InputsOf, MaskOf, default_inputs_of, model_device, reiterable
from shallower.core.modes import evaluating
from shallower.core.processes import agreed_result, raised_anywhere
from shallower.core.trees import to_device
from shallower.errors import MethodError
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.methods.base import Method, activation_of, bound_plan, detach_from, linearisable
from shallower.methods.tlc.criteria import Line, Normal, input_statistics, lines, relative_change, sign_entropies
from shallower.methods.tlc.linearised import Linearised
from shallower.methods.tlc.pace import Pace, Round
from shallower.modules import attachment
from shallower.modules.activations import recognise
from shallower.planning.costs import Cost, cost_after
from shallower.planning.entries import Entry, Fate
from shallower.planning.plan import Plan
from shallower.planning.targets import Target, shortest_prefix
from shallower.sites import Site, Sites
from shallower.surgery.applying import apply
from shallower.training.loop import Loss, Score
from shallower.training.recipe import Checkpoint, Recipe
from shallower.training.rounds import Rounds, Training

Criterion = Literal["loss", "batchnorm", "entropy", "random"]

_Lines = dict[str, tuple[Tensor, Tensor]]
"""By site, the slope and the offset of what takes the activation's place."""

_Ordered = Sequence[tuple[str, tuple[Tensor, Tensor]]]
"""The items of `_Lines`, in the order in which the activations go."""


class TillLayersCollapse(Method):
    """Takes activations away, whole sites at a time, and trains the network again in between.

        sites = sh.find_sites(model, inputs, kinds=("hidden", "activation"))
        method = sh.TillLayersCollapse(model, sites, batches=calibration)
        method.fit(loader, task_loss, recipe, validation=held_out, score=score, floor=0.90, checkpoint="run/")
        plan = method.plan()                            # what is linear now
        plan = method.plan(count=4)                     # or at once, without training

    Attaches to the model at once; as long as no site is linear the model computes what it computed. Sites that cannot
    become linear are left alone, and listed in `method.sites.skipped`. Each activation is either as it was or a fixed
    line, which is part of the model's `state_dict`.

    Args:
        model: trained.
        sites: of both kinds, "hidden" and "activation", so that activations after residual sums count too.
        criterion: in which order activations go.
            "loss": the validation loss with that site alone linear, minus the loss now; the paper's loop.
            "batchnorm": the expected change of the activation's output, relative to its expected size, under the normal
                distribution given by the BatchNorm in front of it, or under measured statistics; needs no labels.
            "entropy": mean binary entropy of the signs of h, measured on `batches` (EASIER, NEPENTHE).
            "random": any, from `seed`.
        line: what takes the place of f. "unit", the paper's: h where its mean is positive, 0 where it is not; the
            channels that are 0 go away entirely in surgery. "best": the line nearest to f in the mean square. "auto":
            "unit" behind a BatchNorm, "best" where statistics are measured (the inputs of a GELU have negative means
            nearly everywhere, so that "unit" would drop most of the site).
        batches: to measure statistics on where no BatchNorm feeds the activation, and entropies; a few hundred
            samples.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        seed: of the random order.

    Raises:
        MethodError: a value is none of these, no site can become linear, batches are needed and missing, or a method
            is attached already.
        SiteError: an activation cannot be exchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        *,
        criterion: Criterion = "batchnorm",
        line: Line = "auto",
        batches: Iterable[Any] | None = None,
        inputs_of: InputsOf = default_inputs_of,
        mask_of: MaskOf | None = None,
        seed: int = 0,
    ) -> None:
        if criterion not in ("loss", "batchnorm", "entropy", "random") or line not in ("auto", "unit", "best"):
            raise MethodError(
                f"criterion={criterion!r}, line={line!r}: the criteria are 'loss', 'batchnorm', 'entropy' and "
                "'random', the lines 'auto', 'unit' and 'best'"
            )
        if criterion == "entropy" and batches is None:
            raise MethodError("criterion='entropy' needs batches= to measure the signs on, a few hundred samples")
        super().__init__(model, linearisable(sites))
        self.criterion = criterion
        self.line = line
        self.batches = None if batches is None else reiterable(batches)
        self.inputs_of = inputs_of
        self.mask_of = mask_of
        self.seed = seed
        self.activations: dict[str, Linearised] = {}
        try:
            for site in self.sites:
                self.activations[site.name] = self._attach(site)
            if self.batches is None:  # say now what is missing
                self._statistics(s for s in self.sites if criterion == "batchnorm" or s.kind != "activation")
        except Exception:
            self.detach()
            raise

    def _attach(self, site: Site) -> Linearised:
        device = model_device(self.model)

        def linearised(f: nn.Module) -> Linearised:
            return Linearised(f, site.width or None, site.bridge.gated, site.bridge.image).to(device)

        module = attachment.attach(self.model, activation_of(site), linearised)
        assert isinstance(module, Linearised)
        return module

    def detach(self) -> None:
        """Puts every activation back; the trained weights stay as they are."""
        detach_from(self.model, self.sites, self.activations)
        self.activations = {}
        self.unfollow()

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of the sites that are linear now, in the network's order."""
        return tuple(name for name, module in self.activations.items() if module.is_linear)

    def linearise(self, names: Iterable[str]) -> None:
        """Take the activations of these sites away, by the statistics as they are now.

        Raises:
            MethodError: there is no such site, or it is linear already.
        """
        going = list(names)
        for name in going:
            if self._known(name).is_linear:
                raise MethodError(f"{name}: it is linear already")
        self._set(self._lines(going))

    def restore(self, names: Iterable[str]) -> None:
        """Put the activations of these sites back."""
        for name in names:
            self._known(name).unset()

    def rank(self, validation: Iterable[Any] | None = None, loss: Loss | None = None) -> dict[str, float]:
        """What each site that is not linear would cost by the criterion, cheapest first.

        Args:
            validation, loss: for the criterion "loss": batches, and a function of the model and a batch.

        Raises:
            MethodError: the criterion needs something that is not given.
        """
        costs = agreed_result(self._costs, validation, loss)
        return dict(sorted(costs.items(), key=lambda item: item[1]))

    def _costs(self, validation: Iterable[Any] | None, loss: Loss | None) -> dict[str, float]:
        """By the criterion, as this process sees it."""
        open_ = self._open()
        sites = self.sites.only(map(self.sites.__getitem__, open_))
        if self.criterion == "loss":
            if validation is None or loss is None:
                raise MethodError("criterion='loss' needs validation batches and the loss to measure on them")
            return self._gaps(open_, validation, loss)
        if self.criterion == "entropy":
            assert self.batches is not None
            return sign_entropies(self.model, sites, self.batches, inputs_of=self.inputs_of, mask_of=self.mask_of)
        if self.criterion == "random":
            order = sorted(self.sites.names)
            random.Random(self.seed).shuffle(order)
            return {name: float(order.index(name)) for name in open_}
        return self._expected(sites)

    def _expected(self, sites: Sites) -> dict[str, float]:
        costs = {}
        for name, normal in self._statistics(sites).items():
            f: nn.Module | None = None  # a ReLU, in closed form
            if recognise(self.activations[name].f) != "relu":
                f = copy.deepcopy(self.activations[name].f).cpu().double().eval()
            costs[name] = relative_change(self.sites[name], normal, self.line, f)
        return costs

    def _gaps(self, names: Sequence[str], validation: Iterable[Any], loss: Loss) -> dict[str, float]:
        base = self._loss(validation, loss)
        planned = self._lines(names)
        gaps = {}
        for name in tqdm(names, desc="gaps", delay=2):
            with self._tried({name: planned[name]}):
                gaps[name] = self._loss(validation, loss) - base
        return gaps

    @contextmanager
    def _tried(self, planned: _Lines) -> Iterator[None]:
        """These sites linear for the length of the context."""
        try:
            self._set(planned)
            yield
        finally:
            self.restore(planned)

    def _loss(self, validation: Iterable[Any], loss: Loss) -> float:
        """Mean loss over the validation batches, in eval mode; the main process's where there are several."""
        device = model_device(self.model)

        def mean() -> float:
            values = [float(loss(self.model, to_device(batch, device))) for batch in reiterable(validation)]
            if not values:
                raise MethodError("the loss needs validation batches, and there are none")
            return fmean(values)

        with evaluating(self.model):
            return agreed_result(mean)

    def _statistics(self, sites: Iterable[Site]) -> dict[str, Normal]:
        return input_statistics(self.model, sites, self.batches, inputs_of=self.inputs_of, mask_of=self.mask_of)

    def _lines(self, names: Iterable[str]) -> _Lines:
        """The lines of these sites, in this order, by the statistics as they are now."""
        found = dict.fromkeys(names, (torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
        measured = (self.sites[name] for name in found if self.sites[name].kind != "activation")
        for name, normal in self._statistics(measured).items():
            found[name] = lines(self.sites[name], normal, self.line)
        return found

    def _open(self) -> list[str]:
        return [name for name, module in self.activations.items() if not module.is_linear]

    def _known(self, name: str) -> Linearised:
        if name not in self.activations:
            raise MethodError(f"there is no site {name!r}; the sites are {', '.join(self.activations)}")
        return self.activations[name]

    @raised_anywhere()
    def plan(
        self,
        *,
        count: int | None = None,
        target: str | Target | None = None,
        score: Score | None = None,
        example_inputs: Inputs | None = None,
        validation: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> Plan:
        """What is linear now; with `count` or `target` also the next ones in order, at once and without training.

        The model stays as it is.

        Args:
            count: activations removed, those that are linear now included.
            target: the fewest that make the model as cheap ("macs:80%", "latency:1.1x", for which it is measured); or
                the most that `score` allows, added one by one ("drop:1%").
            score: of the model, higher is better; for a "drop" target.
            example_inputs: for the other targets.
            validation, loss: for the criterion "loss"; see `rank`.

        Raises:
            MethodError: both are given, the count is out of range, or something needed is missing.
            TargetError: the target cannot be read, or all activations together do not reach it.
        """
        if count is not None and target is not None:
            raise MethodError("use count= or target=, not both")
        now = {name: (self.activations[name].slope, self.activations[name].offset) for name in self.linear}
        if count is None and target is None:
            return self._plan(now)
        if count is not None and not len(now) <= count <= len(self.activations):
            raise MethodError(
                f"count={count}: {len(now)} activations are linear already, and there are {len(self.activations)} sites"
            )
        following = list(self._lines(self.rank(validation, loss)).items())
        if count is not None:
            return self._plan(now | dict(following[: count - len(now)]))
        assert target is not None
        target = Target.parse(target)
        if target.unit == "drop":
            if score is None:
                raise MethodError(f"the target {target} needs score=, a function of the model")
            return self._plan(now | self._affordable(following, target, score))
        if example_inputs is None:
            raise MethodError(f"the target {target} needs example_inputs= to measure what the model costs")
        return self._plan(now | agreed_result(self._cheap, now, following, target, example_inputs))

    def _affordable(self, following: _Ordered, target: Target, score: Score) -> _Lines:
        with evaluating(self.model):
            floor = target.floor(self._scored(score))
            taken: _Lines = {}
            for name, line in tqdm(following, desc=str(target), delay=2):
                with self._tried(taken | {name: line}):
                    if self._scored(score) < floor:
                        break
                taken[name] = line
        return taken

    def _scored(self, score: Score) -> float:
        """The first process's score, so that all decide alike; a sharded model needs all of them to compute it."""
        return float(agreed_result(score, self.model))

    def _cheap(self, now: _Lines, following: _Ordered, target: Target, example_inputs: Inputs) -> _Lines:
        dense = attachment.detached_copy(self.model).eval()
        inputs = to_device(example_inputs, model_device(dense))
        before = cost_of(dense, inputs)
        if target.unit == "latency":
            before = replace(before, latency=compare({"dense": dense}, inputs)["dense"].latency)

        def cost(taken: _Ordered) -> Cost:
            plan = self._plan(now | dict(taken))
            after = cost_after(plan, before, dense)
            if before.latency is None:
                return after
            models = {"dense": dense, "small": apply(dense, plan, inputs)}
            return replace(after, latency=before.latency * compare(models, inputs)["small"].ratio)

        return dict(shortest_prefix(following, target, before, cost))

    def _plan(self, planned: _Lines) -> Plan:
        entries = (_linear_entry(site, *planned[site.name]) for site in self.sites if site.name in planned)
        return bound_plan(self.model, entries, "till-layers-collapse")

    def fit(
        self,
        batches: Iterable[Any],
        loss: Loss,
        recipe: Recipe,
        pace: Pace | None = None,
        *,
        validation: Iterable[Any] | None = None,
        score: Score | None = None,
        floor: float | None = None,
        on_round: Callable[[Round], object] | None = None,
        checkpoint: Checkpoint | Path | str | None = None,
        cpu: bool = False,
    ) -> list[Round]:
        """Takes activations away and trains, round after round.

            rounds = method.fit(loader, task_loss, sh.Recipe(epochs=1, lr=5e-5), score=score, floor=0.9)

        In each round the sites are ordered by the criterion. From the first on, as many go together as leave the
        validation loss no higher than it was; the first alone where there is none of these (`pace` sets a fixed number
        instead). Then the network is trained by the recipe. It ends when no activation is left, after as many rounds
        as `pace` allows, or with a round whose score is under the floor, which is taken back.

        Args:
            batches, loss, recipe: as `train` takes them; the recipe is that of every round.
            pace: how many a round, and how many rounds.
            validation: batches to measure losses on; not those that are trained on.
            score: of the model, higher is better, taken after each round.
            floor: lowest score accepted.
            on_round: called after each round that was trained and kept, while the model is in its state.
            checkpoint: a folder, or a `Checkpoint` of one to write it also within an epoch. After an interruption the
                same call continues where it was, with the same result.
            cpu: stay on the CPU.

        Returns:
            The rounds, in order.

        Raises:
            MethodError: floor is given without score, the criterion needs validation batches, or the checkpoint is of
                another run.
            TrainingError: see `train`.
        """
        pace = Pace() if pace is None else pace
        if self.criterion == "loss" and validation is None:
            raise MethodError("criterion='loss' needs validation= batches, which are not trained on")
        training = Training(batches, loss, recipe, score, floor, checkpoint, cpu)
        rounds = Rounds("round", Round, self, training, self._identity())
        with rounds:
            while self._open() and not rounds.over and len(rounds.finished) < pace.most:
                if not rounds.chosen:
                    rounds.chosen = agreed_result(self._choose, validation, loss, pace.per_round)
                    rounds.keep()
                going = rounds.chosen.pop("lines")
                number, linear = len(rounds.finished) + 1, len(self.linear) + len(going)
                label = f"round {number}, {linear} of {len(self.activations)} linear"
                outcome = rounds.train(label, begin=partial(self._set, going))
                record = Round(tuple(going), self.linear, **rounds.chosen, **vars(outcome))
                rounds.chosen = {}
                if on_round is not None and not rounds.over:
                    on_round(record)
                rounds.finish(record)
        return rounds.finished

    def _set(self, chosen: _Lines) -> None:
        """Put these lines in the place of their sites' activations."""
        for name, (slope, offset) in chosen.items():
            self.activations[name].set(slope, offset)

    def _identity(self) -> dict[str, Any]:
        """What a run that continues must have in common with the one that began."""
        sites = list(self.activations)
        return {"criterion": self.criterion, "line": self.line, "seed": self.seed, "sites": sites}

    def _choose(self, validation: Iterable[Any] | None, loss: Loss, per_round: int | None) -> dict[str, Any]:
        """Which sites go in a round, the lines that take their place, and what was measured."""
        costs = self.rank(validation, loss)
        planned = list(self._lines(costs).items())
        chosen = dict(planned[: per_round or 1])
        if validation is None:
            return {"lines": chosen, "costs": costs, "base": None, "joint": None}
        base = self._loss(validation, loss)

        def joint_loss(together: _Lines) -> float:
            with self._tried(together):
                return self._loss(validation, loss)

        joint = joint_loss(chosen)
        if per_round is None and joint <= base:
            for k in tqdm(range(2, len(planned) + 1), desc="joint", delay=2):
                more = dict(planned[:k])
                value = joint_loss(more)
                if value > base:
                    break
                chosen, joint = more, value
        return {"lines": chosen, "costs": costs, "base": base, "joint": joint}


def _linear_entry(site: Site, slope: Tensor, offset: Tensor) -> Entry:
    if site.kind == "activation":
        return Entry.collapse(site)
    slope, offset = slope.detach().cpu().double(), offset.detach().cpu().double()
    gone = (slope == 0) & (not site.bridge.gated)
    fates = torch.where(gone, int(Fate.DROP), int(Fate.LINEAR)).to(torch.int8)
    return Entry(site, fates, torch.where(gone, torch.ones_like(slope), slope), offset)
