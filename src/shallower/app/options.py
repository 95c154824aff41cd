"""What `shallower compress` can be told, as data: its help, its checks and result.json are all made from these fields.

A new option is a field with a text. A new method is a class here with its options, and its way in `runs/`. Nothing
here needs PyTorch, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from shallower.core.options import Options, option
from shallower.errors import DataError
from shallower.methods.squeezing.options import SqueezeOptions

TaskName = Literal[
    "text-classification", "image-classification", "causal-lm", "feature-extraction", "image-feature-extraction"
]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)

TARGET_TEXT = "params:60%, macs:50%, size:40MB, latency:1.5x or drop:1%."
MINUTES = 5.0
"""That a compression may take, where nobody says."""
MOST_SEED = 2**32 - 1
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""What a model or a data set on the hub is called."""


def same_as(kind: type[Options], name: str) -> Any:
    """A field of the command line that is one of the library's: its default, bounds and text are said there."""
    own = kind.__dataclass_fields__[name]
    return field(default=own.default, metadata=own.metadata)


@dataclass(frozen=True)
class Goal(Options):
    """From what to what."""

    data: str = option(text="A file, a folder or a name on the hub.", flags=("--data", "-d"))
    output: Path = option(text="Folder for the result.", flags=("--output", "-o"))
    target: str = option("", TARGET_TEXT, flags=("--target", "-t"))
    minutes: float = option(MINUTES, "Minutes for all of it.", above=0)


@dataclass(frozen=True)
class Scope(Options):
    """What the model is for, and what of it may change."""

    error: ClassVar = DataError

    task: TaskName | None = option(
        None, f"What the model is for, if it does not say so itself: {', '.join(TASK_NAMES)}.", metavar="TASK"
    )
    sites: str = option("*", "Only sites with names like this: 'encoder.layer.*'.")
    quality_floor: float | None = option(None, "Lowest accuracy (e.g. 0.9) or highest perplexity (e.g. 20) to accept.")


@dataclass(frozen=True)
class DataOptions(Options):
    """How the data is read and divided."""

    title: ClassVar = "Data"
    error: ClassVar = DataError

    eval_data: str = option("", "Validation data, if it is not in --data.")
    text_column: str = option("", "Column of the text; two with a comma for pairs.")
    label_column: str = option("", "Column of the class.")
    image_column: str = option("", "Column of the image.")
    limit: int | None = option(None, "Use at most this many rows per split.", least=2)
    held_out: float = option(0.1, "Fraction held out for validation.", least=0, most=0.9)
    length: int | None = option(None, "Longest text, in tokens.", least=2)
    image_size: int | None = option(None, "Height and width of the images.", least=1, most=16384)
    batch_size: int = option(32, "Rows in a batch.", least=1)


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How a method that trains does it."""

    title: ClassVar = "Training"

    epochs: int = option(3, "Passes over the data in each stage.", least=1)
    dense_epochs: int = option(0, "Passes that train the unchanged model first.", least=0)
    lr: float | None = option(None, "Peak learning rate; by default 1e-4, and for --heal the best of a trial.", least=0)
    augment: bool = option(False, "Shift and mirror images at random.")
    precision: Literal["no", "bf16", "fp16"] = option("no", "Training precision.")


@dataclass(frozen=True)
class RunOptions(Options):
    """Where it runs, and from which random numbers."""

    title: ClassVar = "The run"

    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to compute.")
    seed: int = option(0, "Random seed.", least=0, most=MOST_SEED)


@dataclass(frozen=True)
class Manner(Options):
    """What a command does besides its work: nothing of it changes the result."""

    title: ClassVar = RunOptions.title

    resume: bool = option(True, "Continue an interrupted run, or start over.", flags=("--resume/--fresh",))
    dry_run: bool = option(False, "Print the plan and write nothing.", flags=("--dry-run", "-n"))
    strict: bool = option(False, "Exit with 4 where the result is far below the original.")
    as_json: bool = option(False, "Print one JSON object and nothing else.", flags=("--json",))
    quiet: bool = option(False, "Print errors only.", flags=("--quiet", "-q"))


@dataclass(frozen=True)
class MethodOptions(Options):
    """One method with its own options; what it does is in `runs/`."""

    about: ClassVar = "How to compress."
    short: ClassVar = ("-m",)

    name: ClassVar[str]
    """As `--method` says it."""
    title: ClassVar[str]
    """Over its options in the help."""
    spoken: ClassVar[str]
    """What a sentence calls it."""
    home: ClassVar[str]
    """Where it is run: module:class, a subclass of these options."""
    needs_labels: ClassVar[bool] = True
    """Whether it trains on the task's loss."""
    needs_target: ClassVar[bool] = True
    """Whether it works towards one size, not all of them at once."""
    decides: ClassVar[bool] = False
    """Whether it decides by the minutes that it has."""

    @property
    def trains(self) -> bool:
        """Whether a learning rate means anything to it."""
        return self.needs_labels


@dataclass(frozen=True)
class Squeezing(MethodOptions):
    """Calibrated squeezing."""

    name: ClassVar = "squeeze"
    title: ClassVar = "Squeezing: a few hundred rows, no training (--method squeeze)"
    spoken: ClassVar = "calibrated squeezing"
    home: ClassVar = "shallower.app.runs.squeeze:SqueezeRun"
    needs_labels: ClassVar = False

    samples: int = option(512, "Rows to calibrate on.", least=16)
    uniform: bool = option(False, "Keep the same fraction of every site.")
    round_to: int = same_as(SqueezeOptions, "round_to")
    linear_path: bool = same_as(SqueezeOptions, "linear_path")
    heads: bool = option(False, "Narrow attention heads, too (also with structural-dropout).")
    vary: bool = option(False, "Calibrate on rearranged text, too.")
    sizes: int = option(0, "Smaller sizes to make besides, for pick to choose from.", least=0, most=50)
    heal: int = option(0, "At most so many passes of distillation afterwards.", least=0)

    @property
    def trains(self) -> bool:
        """Only to heal."""
        return self.heal > 0


@dataclass(frozen=True)
class Deciding(Squeezing):
    """Whatever gains most in the minutes that are given."""

    name: ClassVar = "auto"
    title: ClassVar = "Squeezing, and healing as --minutes allow (--method auto, or squeeze)"
    spoken: ClassVar = "calibrated squeezing"
    home: ClassVar = "shallower.app.runs.auto:AutoRun"
    decides: ClassVar = True

    heal: int = option(8, "Passes of distillation afterwards, at most; none with squeeze.", least=0)


@dataclass(frozen=True)
class LayerCollapsing(MethodOptions):
    """LayerCollapse."""

    name: ClassVar = "layer-collapse"
    title: ClassVar = "Collapsing: train until layers merge (--method layer-collapse)"
    spoken: ClassVar = "LayerCollapse"
    home: ClassVar = "shallower.app.runs.layer_collapse:LayerCollapseRun"

    strength: float = option(0.5, "Strength of the penalty on the slopes.", least=0)
    tolerance: float = option(0.05, "Distance from 1 at which a slope counts as linear.", least=0, most=1)
    order: Literal["sensitivity", "last-first"] = option("sensitivity", "Order in which sites collapse.")
    stages: int = option(1, "Rounds over which the sites are spread.", least=1)


@dataclass(frozen=True)
class TillLayersCollapsing(MethodOptions):
    """Till the Layers Collapse."""

    name: ClassVar = "tlc"
    title: ClassVar = "Removing activations, a few at a time (--method tlc)"
    spoken: ClassVar = "Till the Layers Collapse"
    home: ClassVar = "shallower.app.runs.till_layers_collapse:TillLayersCollapseRun"

    criterion: Literal["batchnorm", "loss", "entropy", "random"] = option("batchnorm", "Score that picks activations.")
    per_round: int | None = option(None, "Activations to remove per round.", least=1)


@dataclass(frozen=True)
class StructuralDropping(MethodOptions):
    """Structural Dropout."""

    name: ClassVar = "structural-dropout"
    title: ClassVar = "All widths at once, to pick from (--method structural-dropout)"
    spoken: ClassVar = "Structural Dropout"
    home: ClassVar = "shallower.app.runs.structural_dropout:StructuralDropoutRun"
    needs_target: ClassVar = False

    lower_bound: str = option("25%", "Smallest width to train.")
    points: int = option(8, "Points on the curve.", least=2)
    heads: bool = option(False, "Narrow attention heads, too (also with squeeze).")


@dataclass(frozen=True)
class DepthSqueezing(MethodOptions):
    """Fewer layers, by calibration."""

    name: ClassVar = "depth"
    title: ClassVar = "Fewer layers: a few hundred rows, no training (--method depth)"
    spoken: ClassVar = "taking layers away"
    home: ClassVar = "shallower.app.runs.depth:DepthRun"
    needs_labels: ClassVar = False

    samples: int = same_as(Squeezing, "samples")
    vary: bool = same_as(Squeezing, "vary")
    heal: int = same_as(Squeezing, "heal")

    @property
    def trains(self) -> bool:
        """Only to heal."""
        return self.heal > 0


METHODS: Mapping[str, type[MethodOptions]] = {
    method.name: method
    for method in (
        Deciding,
        Squeezing,
        LayerCollapsing,
        TillLayersCollapsing,
        StructuralDropping,
        DepthSqueezing,
    )
}
"""The methods of the command line, the default first."""
