"""The whole way of `shallower compress`: a trained model and its data in, a smaller model out, with what it cost.

    batches = make_batches(read_rows("reviews.csv", task), task, loaded)
    work = Work(loaded.model, batches, task_named(task), sh.Target.parse("params:60%"))
    result = run_method(work, SqueezeRun())

What a method does on this way is in `runs/`, one file each; here is what they share: the sites, the limits, and the
comparison of the result with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from shallower.app import quality as qualities
from shallower.app.batching import TaskBatches, drawn_rows
from shallower.app.deciding.alarms import alarm_of, dense_alarm_of
from shallower.app.deciding.clock import Clock
from shallower.app.deciding.telling import cost_sentence
from shallower.app.results import CurvePoint, Measured, SiteRow, Verdict
from shallower.app.tasks import Likeness, Task
from shallower.certifying.certificate import Certificate
from shallower.certifying.certify import certify
from shallower.core.inputs import Inputs, model_device
from shallower.core.trees import to_device
from shallower.errors import DataError, SiteError, TargetError
from shallower.measuring.cost import cost_of
from shallower.measuring.measurement import compare
from shallower.modules.attachment import detached_copy
from shallower.planning.costs import Cost, cost_after
from shallower.planning.family import Family
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.training import Checkpoint, Recipe, train

_FEWEST_CERTIFIED = 20
"""Rows on which a result is certified: where there are fewer, the bound says nothing."""
_ROWS_FOR_CHANCE = 200
TIMING_SECONDS = 6.0
"""For which the two models are timed, about, where their passes are long."""
_NEARLY = 1.1
"""A latency of so many times the limit, at most, may be the machine's mood: that is said, and is no error."""
_KEEP_EVERY = 200
"""Steps of a training after which its state is kept."""


def say_nothing(_: str) -> None:
    """Where nobody waits."""


@dataclass(frozen=True)
class Work:
    """What there is to do, for a method and around it.

    Attributes:
        model: where it is to be trained; a method that trains does so in place.
        batches: to calibrate or train on, to validate and to test on.
        task: has the loss and the score.
        goal: what the result has to reach; None where the method makes all sizes at once.
        recipe: of a training.
        lr: the learning rate that was asked for; None where a method may find its own.
        dense_epochs: passes that train the unchanged model first: for a head that is new.
        floor: the lowest score allowed on the validation set; a `drop` target sets one of its own.
        sites: glob on the names of the sites that may change.
        checkpoints: a folder; after an interruption the same work continues from there.
        cpu: stay on the CPU.
        remarks: what people should know about the model and the data.
        clock: the time for all of it, what was done before the method included.
        tell: says what is being done to whoever waits.
    """

    model: nn.Module
    batches: TaskBatches
    task: Task
    goal: Target | None = None
    recipe: Recipe = Recipe(3, 1e-4, warmup=0.1)
    lr: float | None = None
    dense_epochs: int = 0
    floor: float | None = None
    sites: str = "*"
    checkpoints: Path | None = None
    cpu: bool = False
    remarks: tuple[str, ...] = ()
    clock: Clock = field(default_factory=Clock.begun)
    tell: Callable[[str], object] = say_nothing

    @property
    def target(self) -> Target:
        """The goal.

        Raises:
            TargetError: there is none.
        """
        if self.goal is None:
            raise TargetError("there is no target: say how small, fast or good the result has to be (--target)")
        return self.goal

    @property
    def logits(self) -> bool:
        """Whether the model returns logits, not features."""
        return not self.task.features

    @property
    def example(self) -> Inputs:
        """Example inputs, where the model is."""
        inputs: Inputs = to_device(self.batches.example, model_device(self.model))
        return inputs

    def score(self, model: nn.Module) -> float:
        """The score on the validation set."""
        return self.task.score(model, self.batches.validation, label="scoring")

    def sample(self, rows: int) -> list[Any]:
        """Batches of about so many rows of the training set, drawn at random; the same in every call."""
        return self.batches.sample(rows)

    def kept(self, name: str) -> Path | None:
        """The checkpoint of that name, where there is a folder for them."""
        return self.checkpoints and self.checkpoints / name

    def training(self, name: str = "") -> Checkpoint | None:
        """The state of a training, kept every now and then under that name, or in the folder itself."""
        if self.checkpoints is None:
            return None
        return Checkpoint(self.checkpoints / name, _KEEP_EVERY)


@dataclass(frozen=True)
class Outcome:
    """What a method made of a model.

    Attributes:
        model: the smaller one.
        plan: how it was made.
        note: a few words for the table: "3 collapsed".
        advice: what to do where this is not enough.
        score: on the validation set, where it is known.
        story: what was done, in sentences.
        outlook: what more time would bring, in sentences.
        judged: what the result is scored on, where that is not all that there is.
        details: more for result.json, plain data.
        points: of the curve of quality against cost, where the method has one.
        files: more tensors to save, by the name of the file.
        family: plans of the points, where no tensors tell them apart.
    """

    model: nn.Module
    plan: Plan
    note: str
    advice: str = "ask for less"
    score: float | None = None
    story: str = ""
    outlook: str = ""
    judged: TaskBatches | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[CurvePoint] = ()
    files: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    family: Family | None = None


class MethodRun(Protocol):
    """A method on its whole way: its options (see `options.py`), and what it does with them (see `runs/`)."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool]

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """The sites of the model, of the kinds that the method can use."""

    def usable(self, sites: Sites, target: Target | None) -> Sites:
        """Those of a selection that bring the result nearer to the target; SiteError where there is none."""

    def preview(self, work: Work, sites: Sites) -> Plan:
        """What it would do, as far as that is known without training."""

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Do it."""


@dataclass(frozen=True)
class Result:
    """What `run_method` returns.

    Attributes:
        outcome: the smaller model, and how the method made it.
        verdict: the original beside it.
        task: has the score.
        batches: what the two were scored on.
        certificate: how often answers change, on test rows; None where there is none.
        uncertified: why there is none.
        alarms: what makes it a result that nobody should use unwarned.
        remarks: what people should know of the scores.
    """

    outcome: Outcome
    verdict: Verdict
    task: Task
    batches: TaskBatches
    certificate: Certificate | None = None
    uncertified: str = ""
    alarms: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The smaller model."""
        return self.outcome.model

    @property
    def summary(self) -> str:
        """In a paragraph what was done, what it cost, and what more time would bring."""
        counts, kind = self.batches.counts, "test"
        if counts["test"] is None:
            kind = "validation"
        rows = f"{counts[kind]:,} {kind} {qualities.rows_of(self.task.quality)}"
        cost = cost_sentence(self.verdict, self.task.quality, rows)
        return " ".join(filter(None, (self.outcome.story, cost, self.outcome.outlook)))


def run_method(work: Work, method: MethodRun) -> Result:
    """Make a model as small as the target asks for.

        result = run_method(Work(model, batches, task, sh.Target.parse("params:60%")), SqueezeRun())
        result.model, result.verdict

    Raises:
        SiteError: no site can be squeezed.
        TargetError: the target cannot be met, or was not met above the floor.
        TrainingError, MethodError, FitError: see the method.
    """
    sites = _chosen_sites(work, method)
    if work.dense_epochs:
        _train_dense(work)
    dense, base, work = _judged(work)
    outcome = method.make(work, sites)
    if outcome.judged is not None:
        work, base = replace(work, batches=outcome.judged), None
    task = work.task
    if work.floor is not None:
        score = outcome.score
        if score is None:
            score = work.score(outcome.model)
        if score < work.floor:
            raise TargetError(
                f"the {task.quality} of the result is {task.show(score)}, and {task.show(work.floor)} is the limit: "
                f"{outcome.advice}"
            )
    if work.batches.test is not work.batches.validation:
        base = None
    verdict = judge(dense, outcome.model, work.batches, task, base)
    missed = _missed(work.goal, verdict, outcome)
    certificate, uncertified = _certified(work, dense, outcome)
    chance, before, after = _chance(work, dense), verdict.dense.score, verdict.small.score
    alarms = *missed, alarm_of(task.quality, before, after, chance)
    remarks = *work.batches.remarks, dense_alarm_of(task.quality, before, chance)
    said = [tuple(filter(None, words)) for words in (alarms, remarks)]
    return Result(outcome, verdict, task, work.batches, certificate, uncertified, *said)


def preview(work: Work, method: MethodRun) -> tuple[Plan, Cost, Cost]:
    """What `run_method` would do, as far as that is known without training; what the model costs before and after.

    Nothing is written, and the model stays as it is.

    Raises:
        SiteError: no site can be squeezed.
        TargetError: the target cannot be met.
    """
    sites = _chosen_sites(work, method)
    dense, _, work = _judged(work)
    plan = method.preview(work, sites)
    before = cost_of(dense, work.example)
    return plan, before, cost_after(plan, before, dense)


def judge(dense: nn.Module, small: nn.Module, batches: TaskBatches, task: Task, known: float | None = None) -> Verdict:
    """Score both on the test set, count their costs, and time them in turn.

    Args:
        dense, small: the two models.
        batches: of the data.
        task: has the score.
        known: the score of the dense one, where it was taken already.
    """
    example = to_device(batches.example, model_device(dense))
    times = compare({"dense": dense, "small": small}, example, seconds=TIMING_SECONDS)
    if known is None:
        known = task.score(dense, batches.test, label="scoring: dense")
    score = task.score(small, batches.test, label="scoring: small")
    return Verdict(
        measured(known, cost_of(dense, example), times["dense"].latency),
        measured(score, cost_of(small, example), times["small"].latency),
        times["small"].speedup,
        times["small"].ratio_spread,
    )


def measured(score: float, cost: Cost, latency: float | None) -> Measured:
    """A score beside counted costs and a latency."""
    return Measured(score, cost.params, cost.macs, cost.size, latency, cost.kv)


def site_rows(plan: Plan) -> tuple[SiteRow, ...]:
    """What becomes of each site of a plan."""
    found = []
    for step in steps(plan.entries):
        entry, form, site = step.entry, step.form, step.entry.site
        row = SiteRow(
            site.name,
            site.kind,
            site.width,
            len(entry.kept),
            len(entry.linear),
            len(entry.dropped),
            form.kind,
            form.rank,
            (form.params_before, form.params),
            (form.macs_before, form.macs),
            entry.error,
            entry.note,
        )
        found.append(row)
    return tuple(found)


def _train_dense(work: Work) -> None:
    recipe = replace(work.recipe, epochs=work.dense_epochs)
    train(
        work.model,
        work.batches.train,
        work.task.loss,
        recipe,
        checkpoint=work.kept("dense.safetensors"),
        label="training the unchanged model",
        cpu=work.cpu,
    )


def _chosen_sites(work: Work, method: MethodRun) -> Sites:
    found = method.find(work.model, work.example)
    try:
        return method.usable(found.select(work.sites), work.goal)
    except SiteError as error:
        if work.sites == "*":
            raise
        raise SiteError(f"of the sites that --sites {work.sites!r} selects: {error}") from error


def _judged(work: Work) -> tuple[nn.Module, float | None, Work]:
    """A copy of the model as it is, its score on the validation set where that sets a limit, and the work with it.

    Raises:
        TargetError: the model itself is below the limit.
    """
    dense = detached_copy(work.model).eval()
    if isinstance(work.task, Likeness):
        work = replace(work, task=work.task.to(dense))
    task, target = work.task, work.goal
    floors = []
    if work.floor is not None:
        floors.append(work.floor)
    drops = target is not None and target.unit == "drop"
    if not drops and not floors:
        return dense, None, work
    base = task.score(dense, work.batches.validation, label="scoring the unchanged model")
    if target is not None and drops:
        floors.append(target.floor(base))
    floor = max(floors)
    if base < floor:
        raise TargetError(
            f"the {task.quality} of the unchanged model, {task.show(base)}, does not reach {task.show(floor)}: "
            "allow less, or train the model first (--dense-epochs)"
        )
    return dense, base, replace(work, floor=floor)


def _certified(work: Work, dense: nn.Module, outcome: Outcome) -> tuple[Certificate | None, str]:
    """The certificate of a result, or why there is none."""
    count = work.batches.counts["test"]
    if count is None:
        return None, "the data has no test rows, and choices were made on all others"
    if count < _FEWEST_CERTIFIED:
        return None, f"{count} test rows are too few, at least {_FEWEST_CERTIFIED} are needed"
    try:
        found = certify(
            dense, outcome.model, work.batches.test, seen=outcome.plan, logits=work.logits, seed=work.recipe.seed
        )
    except DataError as error:
        return None, str(error)
    return found, ""


def _chance(work: Work, dense: nn.Module) -> float:
    """The score of knowing nothing, on some of the rows that are scored."""
    if work.task.quality == "perplexity":
        return 0.0
    rows = drawn_rows(work.batches.test, _ROWS_FOR_CHANCE, work.recipe.seed)
    return work.task.chance(dense, rows)


def _missed(target: Target | None, verdict: Verdict, outcome: Outcome) -> Sequence[str]:
    """A word on a latency that was nearly reached; nothing where the target is met.

    Raises:
        TargetError: the result misses the target, one of latency by more than a machine's moods explain.
    """
    if target is None or target.unit == "drop":
        return ()
    before, after = verdict.dense.cost, verdict.small.cost
    timed = target.unit == "latency" and before.latency is not None
    if before.latency is not None:
        # A latency counts as reached where the limit lies within the spread of the measurement.
        after = replace(after, latency=before.latency * (1 / verdict.speedup - verdict.spread / 2))
    if target.met(before, after):
        return ()
    whole = target.amount_of(before)
    reached = f"{target.amount_of(after) / whole:.1%} was reached"
    if timed:
        reached = f"the result is {verdict.speedup:.2f} times as fast (the ratio varied by {verdict.spread:.1%})"
    said = (
        f"the target {target} asks for {target.limit(before) / whole:.1%} of the model's {target.unit}, and {reached}"
    )
    if timed and target.amount_of(after) <= _NEARLY * target.limit(before):
        return (said,)
    raise TargetError(f"{said}: {outcome.advice}")
