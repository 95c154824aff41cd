"""A short distillation after squeezing: the small network is trained to do what the original does.

    history = sh.heal(small, dense, batches)

No labels are needed. Either the outputs of both networks are compared, or the outputs of every site's consumers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shallower.core.batches import Batch
from shallower.core.inputs import InputsOf, default_inputs_of
from shallower.errors import MethodError
from shallower.training.guiding import Healing, guided
from shallower.training.loop import Score, train
from shallower.training.matching import Lesson, Matching, Pupil, Teacher
from shallower.training.recipe import Checkpoint, History, Recipe


def recipe(epochs: int, lr: float = 1e-4, seed: int = 0) -> Recipe:
    """How to heal: AdamW without weight decay, a short warm-up, then a cosine to zero."""
    return Recipe(epochs=epochs, lr=lr, weight_decay=0.0, warmup=0.05, seed=seed)


def heal(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | Healing | None = None,
    matching: Matching | None = None,
    *,
    inputs_of: InputsOf = default_inputs_of,
    score: Score | None = None,
    floor: float | None = None,
    checkpoint: Checkpoint | Path | str | None = None,
    cpu: bool = False,
) -> History:
    """Train `small`, in place, to do what `dense` does.

        small = sh.apply(model, plan, example_inputs)
        history = sh.heal(small, model, batches)
        history.before, history.best

    One row in ten is held out. The learning rate is the one with which a few steps from the same start bring most on
    these rows; the training looks at them again and again, ends where they no longer gain, and leaves the network in
    the best state that it found: never farther from the original, there, than it was. Small parts of the batches make
    a step, so that few rows make many. All modules run as in evaluation: no dropout, BatchNorm with the statistics
    that it has.

    Args:
        small: the model after surgery; its parameters that require a gradient are trained.
        dense: the model it was made from; it is not changed.
        batches: read once, a part of them first; labels are not read. With a `Recipe`, iterated once an epoch, with a
            length.
        recipe: by default `Healing()`, which finds its own. A `Recipe` trains as it says to its end, on all batches.
        matching: what is compared; by default the outputs.
        inputs_of: picks the model's inputs out of a batch.
        score: called with the model in eval mode, higher is better; takes the place of the rows held out.
        floor: lowest acceptable score; see `train`.
        checkpoint: a file (.safetensors), or a `Checkpoint`, that an interrupted run continues from; one of other
            weights, batches or options is refused.
        cpu: stay on the CPU even where there is an accelerator.

    Returns:
        What the training saw. `lr` is the rate that was found; scores are minus the divergence on the rows held out.

    Raises:
        MethodError: both models are one.
        SiteError: one of the models has no layer of that name.
        TrainingError: there are not two rows, so that none can be held out; or see `train`.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if small is dense:
        raise MethodError("small and dense are the same model: pass the one that surgery made, and the original")
    how = Healing() if recipe is None else recipe
    kept: dict[str, Any] = {"score": score, "floor": floor, "checkpoint": Checkpoint.of(checkpoint), "cpu": cpu}
    with Teacher(dense, Matching() if matching is None else matching) as teacher:
        if isinstance(how, Healing):
            return guided(small, teacher, batches, how, inputs_of, **kept)

        def distance(student: nn.Module, batch: Any) -> Tensor:
            lesson = Lesson(Batch(inputs_of(batch), teacher.matching.mask_of(batch)))
            return teacher.distance(student, lesson, small)

        return train(small, batches, distance, how, method=Pupil(small), label="healing", **kept)
