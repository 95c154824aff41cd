"""The whole way of `shallower compress`: a trained model and its data in, a smaller model out, with what it cost.

batches = make_batches(read_rows("reviews.csv", task), task, loaded.model, loaded.processor)
result = compress(loaded.model, batches, task_named(task), Settings(Target.parse("params:60%"), recipe))
print(result)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shallower.attachment import detached_copy
from shallower.batching import Batches
from shallower.budget import Cost, Target, shortest_prefix
from shallower.errors import SiteError, TargetError
from shallower.inputs import Inputs, model_device, to_device
from shallower.matching import find_sites
from shallower.measuring import compare, count_macs, count_params
from shallower.methods.layer_collapse import LayerCollapse, Stage
from shallower.plan import Entry, Plan
from shallower.sites import Site, Sites, amount
from shallower.surgery import apply
from shallower.tables import table
from shallower.tasks import Task
from shallower.training import Recipe, train

PROBE = 8
"""Batches of the training data on which the sensitivity of the sites is measured."""


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        target: what the result has to reach.
        recipe: of the training, for each stage.
        strength: of LayerCollapse's penalty.
        tolerance: how near to 1 a slope counts as linear.
        order: which sites go first: those that change the model least, or the last.
        stages: into how many stages the sites are divided.
        dense_epochs: passes that train the model as it is, before: for a head that is new.
        floor: the lowest score allowed; a `drop` target sets one of its own.
        sites: glob on the names of the sites that may collapse.
    """

    target: Target
    recipe: Recipe
    strength: float = 0.5
    tolerance: float = 0.05
    order: Literal["sensitivity", "last-first"] = "sensitivity"
    stages: int = 1
    dense_epochs: int = 0
    floor: float | None = None
    sites: str = "*"


@dataclass(frozen=True)
class Side:
    """A model before or after: its score on the test rows, and its cost on the example inputs.

    Attributes:
        score: higher is better.
        params: number of parameters.
        macs: multiply-accumulates of one forward pass.
        memory: bytes of parameters and buffers.
        latency: median seconds of one forward pass.
    """

    score: float
    params: int
    macs: int
    memory: int
    latency: float

    @property
    def cost(self) -> Cost:
        """Without the score."""
        return Cost(self.params, self.macs, self.memory, self.latency)


@dataclass(frozen=True)
class Verdict:
    """A model and the smaller one that was made of it, side by side.

    Attributes:
        dense, small: the two.
        measured: how many times faster the small one is, timed in turn with the dense one.
        spread: interquartile range of the ratio of the two times.
    """

    dense: Side
    small: Side
    measured: float
    spread: float

    @property
    def predicted(self) -> float:
        """How many times faster the small one would be if time were MACs alone."""
        return self.dense.macs / max(1, self.small.macs)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        speed = {"predicted": self.predicted, "measured": self.measured, "spread": self.spread}
        return {"dense": asdict(self.dense), "small": asdict(self.small), "speed": speed}

    def rows(self, task: Task, name: str, note: str = "") -> list[tuple[str, ...]]:
        """Two rows of `verdict_table`: dense and small."""
        dense, small = self.dense, self.small
        change = f"{small.params / dense.params - 1:+.0%}"
        return [
            (name, task.show(dense.score), amount(dense.params), "", amount(dense.macs), _ms(dense.latency), "", ""),
            (
                f"  {note}".rstrip(),
                task.show(small.score),
                amount(small.params),
                change,
                amount(small.macs),
                _ms(small.latency),
                f"{self.predicted:.2f}x",
                f"{self.measured:.2f}x",
            ),
        ]


def verdict_table(quality: str, rows: Sequence[tuple[str, ...]]) -> str:
    """The rows of one or more verdicts under their header."""
    header = ("model", quality, "params", "", "MACs", "latency", "predicted", "measured")
    return table(header, rows, right=range(1, 8))


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the smaller model.
        plan: how it was made.
        collapsed: names of the sites that are one linear map now.
        stages: of the training.
        verdict: dense against small.
    """

    model: nn.Module
    plan: Plan
    collapsed: tuple[str, ...]
    stages: tuple[Stage, ...]
    verdict: Verdict


def compress(
    model: nn.Module,
    batches: Batches,
    task: Task,
    settings: Settings,
    *,
    sites: Sites | None = None,
    checkpoints: Path | None = None,
    cpu: bool = False,
) -> Result:
    """Collapse as many sites of `model` by LayerCollapse as the target asks for. The model is trained in place.

    Args:
        model: where it is to be trained.
        batches: to train on, to choose by and to report on.
        task: gives the loss and the score.
        settings: the target and how to train.
        sites: where `find_sites` has run already.
        checkpoints: a folder; after an interruption the same call goes on from there.
        cpu: stay on the CPU.

    Raises:
        SiteError: no site can collapse.
        TargetError: the target cannot be met, or was not met above the floor.
        TrainingError, MethodError: see `LayerCollapse.fit`.
    """
    sites = find_sites(model, batches.example) if sites is None else sites
    sites = collapsible(sites.select(settings.sites), settings)
    device = model_device(model)
    if settings.dense_epochs:
        recipe = replace(settings.recipe, epochs=settings.dense_epochs)
        path = checkpoints and checkpoints / "dense.safetensors"
        train(model, batches.train, task.loss, recipe, checkpoint=path, label="training the model as it is", cpu=cpu)
        model.to(device)
    dense = detached_copy(model).eval()
    base = task.score(dense, batches.validation, label="scoring the model as it is")
    target = settings.target
    floors = [settings.floor, target.floor(base) if target.unit == "drop" else None]
    floor = max((value for value in floors if value is not None), default=None)
    if floor is not None and base < floor:
        raise TargetError(
            f"the {task.quality} of the model as it is, {task.show(base)}, does not reach {task.show(floor)}: "
            "allow less, or train the model first (--dense-epochs)"
        )
    chosen = choose(model, sites, batches, settings)
    method = LayerCollapse(model, chosen, settings.strength)
    try:
        stages = method.fit(
            batches.train,
            task.loss,
            settings.recipe,
            stages=len(chosen) if target.unit == "drop" else min(settings.stages, len(chosen)),
            order=[site.name for site in chosen],
            tolerance=settings.tolerance,
            score=None if floor is None else lambda m: task.score(m, batches.validation, label="scoring"),
            floor=floor,
            checkpoint=checkpoints,
            cpu=cpu,
        )
        model.to(device)
        plan = method.plan(settings.tolerance, batches=list(islice(batches.train, PROBE)))
        collapsed = stages[-1].collapsed
        if not collapsed:
            raise TargetError(f"no site could collapse: {_why_not(task, stages, floor)}")
        small = apply(model, plan, to_device(batches.example, device)).eval()
    finally:
        method.detach()
    verdict = judge(dense, small, batches, task, base if batches.test is batches.validation else None)
    before, after = verdict.dense.cost, replace(verdict.small.cost, latency=verdict.dense.latency / verdict.measured)
    if target.unit != "drop" and not target.met(before, after):
        whole = target.amount_of(before)
        raise TargetError(
            f"the target {target} asks for {target.limit(before) / whole:.1%} of the model's {target.unit}, and "
            f"{target.amount_of(after) / whole:.1%} was reached with {len(collapsed)} of {len(chosen)} sites: "
            f"{_why_not(task, stages, floor)}"
        )
    return Result(small, plan, collapsed, tuple(stages), verdict)


def collapsible(sites: Sites, settings: Settings) -> Sites:
    """Those sites that become cheaper, in the unit of the target, when they collapse.

    Raises:
        SiteError: there is none; the error says why.
    """
    by_params = settings.target.unit in ("params", "memory")

    def saves(site: Site) -> bool:
        if site.not_linear or site.activation is None:
            return False
        entry = Entry.collapse(site)
        params, macs = entry.params_after < site.params, entry.macs_after < site.macs
        return params if by_params else macs if settings.target.unit != "drop" else params or macs

    found = sites.select(saves)
    if not found.items:
        reasons = [f"{site.name}: {site.not_linear or 'it does not become cheaper'}" for site in sites]
        reasons += [f"{name}: {reason}" for name, reason in sites.skipped.items()]
        which = "" if settings.sites == "*" else f" of those that --sites {settings.sites!r} selects"
        told = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        raise SiteError(f"the model has no site{which} that can collapse and pays{': ' if told else ''}{told}")
    return found


def choose(model: nn.Module, sites: Sites, batches: Batches, settings: Settings) -> Sites:
    """As few sites as meet the target, in the order in which they shall collapse; for a `drop` target, all of them."""
    if settings.order == "last-first":
        order = list(sites.items[::-1])
    else:
        method = LayerCollapse(model, sites, settings.strength)
        try:
            costs = method.sensitivity(list(islice(batches.train, PROBE)))
        finally:
            method.detach()
        order = sorted(sites, key=lambda site: costs[site.name])
    if settings.target.unit == "drop":
        return replace(sites, items=tuple(order))
    example = to_device(batches.example, model_device(model))
    before = _cost(model, example)
    timed = settings.target.unit == "latency"
    latency = compare({"dense": model}, example)["dense"].latency if timed else 0.0

    def cost_of(prefix: Sequence[Site]) -> Cost:
        plan = Plan(tuple(Entry.collapse(site) for site in prefix))
        if timed:
            speed = compare({"dense": model, "small": apply(model, plan, example)}, example)
            return Cost(0, 0, 0, latency * speed["small"].ratio)
        wide = next(model.parameters()).element_size()
        params, macs = before.params - plan.params_saved, before.macs - plan.macs_saved
        return Cost(params, macs, before.memory - wide * plan.params_saved)

    if timed:
        before = replace(before, latency=latency)
    return replace(sites, items=tuple(shortest_prefix(order, settings.target, before, cost_of)))


def judge(dense: nn.Module, small: nn.Module, batches: Batches, task: Task, known: float | None = None) -> Verdict:
    """Score both on the test rows, count their costs, and time them in turn; `known` is the score of the dense one."""
    example = to_device(batches.example, model_device(dense))
    times = compare({"dense": dense, "small": small}, example)
    scores = {"dense": known} if known is not None else {}
    sides = {}
    for name, model in (("dense", dense), ("small", small)):
        score = scores[name] if name in scores else task.score(model, batches.test, label=f"scoring: {name}")
        cost = _cost(model, example)
        sides[name] = Side(score, cost.params, cost.macs, cost.memory, times[name].latency)
    return Verdict(sides["dense"], sides["small"], times["small"].speedup, times["small"].ratio_spread)


def _cost(model: nn.Module, example: Inputs) -> Cost:
    model.eval()
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    memory = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Cost(count_params(model), count_macs(model, example), memory)


def _why_not(task: Task, stages: Sequence[Stage], floor: float | None) -> str:
    last = stages[-1]
    if last.taken_back and last.score is not None and floor is not None:
        sites = ", ".join(last.sites)
        return (
            f"with {sites} too the {task.quality} is {task.show(last.score)}, and {task.show(floor)} is the limit. "
            "Allow more loss, train longer (--epochs), or ask for less"
        )
    slopes = ", ".join(f"{name} {slope:.2f}" for name, slope in last.slopes.items())
    return f"the slopes did not come near 1 ({slopes}). Train longer (--epochs) or pull harder (--strength)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
