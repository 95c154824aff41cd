"""The whole way of `shallower compress`: a trained model and its data in, a smaller model out, with what it cost.

    batches = make_batches(read_rows("reviews.csv", task), task, loaded.model, loaded.processor)
    result = compress(loaded.model, batches, task_named(task), Settings(Target.parse("params:60%"), SqueezeRun()))
    print(verdict_table(...))

What a method does on this way is in `runs/`, one file each; here is what they share: the sites, the limits, the
judgement of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from shallower.app.batching import Batches
from shallower.app.tasks import Likeness, Task
from shallower.core.inputs import Inputs, model_device, to_device
from shallower.core.text import amount, table
from shallower.errors import SiteError, TargetError
from shallower.measuring.measurement import compare, count_macs, count_params
from shallower.modules.attachment import detached_copy
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.planning.targets import Cost, Target
from shallower.sites import Sites
from shallower.training import Recipe, train


@dataclass(frozen=True)
class Work:
    """What a method is given to work on.

    Attributes:
        model: where it is to be trained; may be changed.
        sites: those that may be squeezed.
        batches: to calibrate or train on, and to choose by.
        task: gives the loss and the score.
        goal: what the result has to reach; None where the method makes all sizes at once.
        recipe: of a training.
        floor: the lowest score allowed on the rows to choose by; a `drop` target sets one of its own.
        checkpoints: a folder; after an interruption the same work goes on from there.
        cpu: stay on the CPU.
    """

    model: nn.Module
    sites: Sites
    batches: Batches
    task: Task
    goal: Target | None
    recipe: Recipe
    floor: float | None = None
    checkpoints: Path | None = None
    cpu: bool = False

    @property
    def target(self) -> Target:
        """The goal.

        Raises:
            TargetError: there is none.
        """
        if self.goal is None:
            raise TargetError(
                "there is no target to reach: say how small, fast or good the result has to be (--target)"
            )
        return self.goal

    def score(self, model: nn.Module) -> float:
        """On the rows to choose by."""
        return self.task.score(model, self.batches.validation, label="scoring")

    def probe(self, rows: int) -> list[Any]:
        """Batches of about so many rows of the training part, drawn at random; the same in every pass."""
        size = self.batches.train.batch_size or 1
        return list(islice(self.batches.train, -(-rows // size)))

    @property
    def logits(self) -> bool:
        """Whether the model answers with logits, not with features."""
        return not (isinstance(self.task, Likeness) and self.task.features)

    @property
    def example(self) -> Inputs:
        """Example inputs, where the model is."""
        inputs: Inputs = to_device(self.batches.example, model_device(self.model))
        return inputs


@dataclass(frozen=True)
class Made:
    """What a method made of a model.

    Attributes:
        model: the smaller one.
        plan: how it was made.
        note: of a few words, for the table: "3 collapsed".
        advice: what to do where this is not enough.
        score: on the rows to choose by, where it is known.
        details: more for result.json, plain data.
        points: of the curve of quality against cost, where the method has one; plain data.
        files: more tensors to be saved, by the name of the file.
    """

    model: nn.Module
    plan: Plan
    note: str
    advice: str = "ask for less"
    score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class MethodRun(Protocol):
    """One method on its whole way, with its own options; a frozen dataclass, see `runs/`."""

    name: ClassVar[str]
    """As `--method` says it."""
    needs_labels: ClassVar[bool]
    """Whether it trains on the task's loss."""
    needs_target: ClassVar[bool]
    """Whether it works towards one size, not all of them at once."""

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """The sites of the model, of the kinds that the method can use."""

    def usable(self, sites: Sites, target: Target | None) -> Sites:
        """Those of a selection with which this method can get nearer to the target; SiteError where there is none."""

    def preview(self, work: Work) -> Plan:
        """What it would do, as far as that can be told without training."""

    def make(self, work: Work) -> Made:
        """Do it."""


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        target: what the result has to reach; None where the method makes all sizes at once.
        run: the method, with its options.
        recipe: of the training, for methods that train.
        dense_epochs: passes that train the model as it is, before: for a head that is new.
        floor: the lowest score allowed; a `drop` target sets one of its own.
        sites: glob on the names of the sites that may be squeezed.
    """

    target: Target | None
    run: MethodRun
    recipe: Recipe = Recipe(3, 1e-4, warmup=0.1)  # noqa: RUF009 - it is frozen
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
        """All but the score."""
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
        made: the smaller model, and how the method made it.
        verdict: dense against small.
        task: what the scores are of.
    """

    made: Made
    verdict: Verdict
    task: Task

    @property
    def model(self) -> nn.Module:
        """The smaller model."""
        return self.made.model


def compress(
    model: nn.Module,
    batches: Batches,
    task: Task,
    settings: Settings,
    *,
    checkpoints: Path | None = None,
    cpu: bool = False,
) -> Result:
    """Make `model` as small as the target asks for, by the method that the settings name.

    Args:
        model: where it is to be trained. A method that trains does so in place.
        batches: to calibrate or train on, to choose by and to report on.
        task: gives the loss and the score.
        settings: the target, the method and how to train.
        checkpoints: a folder; after an interruption the same call goes on from there.
        cpu: stay on the CPU.

    Raises:
        SiteError: no site can be squeezed.
        TargetError: the target cannot be met, or was not met above the floor.
        TrainingError, MethodError, FitError: see the method.
    """
    sites = _sites(model, batches, settings)
    if settings.dense_epochs:
        recipe = replace(settings.recipe, epochs=settings.dense_epochs)
        path = checkpoints and checkpoints / "dense.safetensors"
        train(model, batches.train, task.loss, recipe, checkpoint=path, label="training the model as it is", cpu=cpu)
    dense = detached_copy(model).eval()
    if isinstance(task, Likeness):
        task = task.to(dense)
    base, floor = _limits(dense, batches, task, settings)
    work = Work(model, sites, batches, task, settings.target, settings.recipe, floor, checkpoints, cpu)
    made = settings.run.make(work)
    if floor is not None:
        score = work.score(made.model) if made.score is None else made.score
        if score < floor:
            raise TargetError(
                f"the {task.quality} of the result is {task.show(score)}, and {task.show(floor)} is the limit: "
                f"{made.advice}"
            )
    verdict = judge(dense, made.model, batches, task, base if batches.test is batches.validation else None)
    _check_target(settings.target, verdict, made)
    return Result(made, verdict, task)


def preview(
    model: nn.Module, batches: Batches, task: Task, settings: Settings, *, cpu: bool = False
) -> tuple[Plan, Cost, Cost]:
    """What `compress` would do, as far as that can be told without training; what the model costs before and after.

    Nothing is written, and the model stays as it is.

    Raises:
        SiteError: no site can be squeezed.
        TargetError: the target cannot be met.
    """
    sites = _sites(model, batches, settings)
    dense = detached_copy(model).eval()
    if isinstance(task, Likeness):
        task = task.to(dense)
    _, floor = _limits(dense, batches, task, settings)
    work = Work(model, sites, batches, task, settings.target, settings.recipe, floor, None, cpu)
    plan = settings.run.preview(work)
    before = cost_of(dense, work.example)
    return plan, before, cost_after(plan, before, dense)


def judge(dense: nn.Module, small: nn.Module, batches: Batches, task: Task, known: float | None = None) -> Verdict:
    """Score both on the test rows, count their costs, and time them in turn; `known` is the score of the dense one."""
    example = to_device(batches.example, model_device(dense))
    times = compare({"dense": dense, "small": small}, example)
    scores = {"dense": known} if known is not None else {}
    sides = {}
    for name, model in (("dense", dense), ("small", small)):
        score = scores[name] if name in scores else task.score(model, batches.test, label=f"scoring: {name}")
        cost = cost_of(model, example)
        sides[name] = Side(score, cost.params, cost.macs, cost.memory, times[name].latency)
    return Verdict(sides["dense"], sides["small"], times["small"].speedup, times["small"].ratio_spread)


def cost_of(model: nn.Module, example: Inputs) -> Cost:
    """What a model costs on example inputs, all but the latency."""
    model.eval()
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    memory = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Cost(count_params(model), count_macs(model, example), memory)


def cost_after(plan: Plan, before: Cost, model: nn.Module) -> Cost:
    """What remains of `before` with a plan applied, counted."""
    wide = next(model.parameters()).element_size()
    saved = plan.params_saved
    return Cost(before.params - saved, before.macs - plan.macs_saved, before.memory - wide * saved)


def site_table(plan: Plan) -> list[dict[str, Any]]:
    """What became of each site of a plan, as plain data."""
    return [
        {
            "name": step.entry.site.name,
            "kind": step.entry.site.kind,
            "width": step.entry.site.width,
            "kept": len(step.entry.kept),
            "linear": len(step.entry.linear),
            "dropped": len(step.entry.dropped),
            "becomes": step.form.kind,
            "rank": step.form.rank,
            "params": [step.form.params_before, step.form.params],
            "macs": [step.form.macs_before, step.form.macs],
            "note": getattr(step.entry, "note", ""),
        }
        for step in steps(plan.entries)
    ]


def _sites(model: nn.Module, batches: Batches, settings: Settings) -> Sites:
    found = settings.run.find(model, to_device(batches.example, model_device(model)))
    chosen = found.select(settings.sites)
    try:
        return settings.run.usable(chosen, settings.target)
    except SiteError as error:
        if settings.sites == "*":
            raise
        raise SiteError(f"of the sites that --sites {settings.sites!r} selects: {error}") from error


def _limits(dense: nn.Module, batches: Batches, task: Task, settings: Settings) -> tuple[float | None, float | None]:
    """The model's score on the rows to choose by and the lowest one allowed, where they are needed."""
    target, drop = settings.target, settings.target is not None and settings.target.unit == "drop"
    if not drop and settings.floor is None:
        return None, None
    base = task.score(dense, batches.validation, label="scoring the model as it is")
    floors = [settings.floor, target.floor(base) if drop and target is not None else None]
    floor = max(value for value in floors if value is not None)
    if base < floor:
        raise TargetError(
            f"the {task.quality} of the model as it is, {task.show(base)}, does not reach {task.show(floor)}: "
            "allow less, or train the model first (--dense-epochs)"
        )
    return base, floor


def _check_target(target: Target | None, verdict: Verdict, made: Made) -> None:
    if target is None or target.unit == "drop":
        return
    # A latency counts as reached where the limit lies within the spread of the measurement.
    ratio = 1 / verdict.measured - verdict.spread / 2
    before, after = verdict.dense.cost, replace(verdict.small.cost, latency=verdict.dense.latency * ratio)
    if not target.met(before, after):
        whole = target.amount_of(before)
        raise TargetError(
            f"the target {target} asks for {target.limit(before) / whole:.1%} of the model's {target.unit}, and "
            f"{target.amount_of(after) / whole:.1%} was reached: {made.advice}"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
