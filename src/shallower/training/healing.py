"""A short distillation after squeezing: the small network is trained to do what the original does.

    history = sh.heal(small, dense, batches, sh.Recipe(epochs=2, lr=1e-4))

No labels are needed. Either the outputs of both networks are compared, or the outputs of every site's consumers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, default_mask_of, model_device
from shallower.core.modes import evaluating
from shallower.core.options import Options, option
from shallower.core.outputs import are_logits
from shallower.core.trees import tensors
from shallower.core.watching import recorded
from shallower.errors import MethodError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.sites import Sites
from shallower.training.accelerating import placed
from shallower.training.divergence import kl_divergence, relative_divergence
from shallower.training.loop import Score, train
from shallower.training.recipe import Checkpoint, History, Recipe

Match = Literal["outputs", "sites"]


def recipe(epochs: int, lr: float = 1e-4, seed: int = 0) -> Recipe:
    """How to heal: AdamW without weight decay, a short warm-up, then a cosine to zero."""
    return Recipe(epochs=epochs, lr=lr, weight_decay=0.0, warmup=0.05, seed=seed)


@dataclass(frozen=True)
class Matching(Options):
    """What `heal` compares between the two networks.

        sh.heal(small, model, batches, matching=sh.Matching(temperature=2.0))
        sh.heal(small, model, batches, matching=sh.Matching("sites", sites))

    Attributes:
        match: "outputs" compares what the models return: of logits the Kullback-Leibler divergence of the
            distributions, else the squared error relative to the original's output. "sites" compares the output
            of each site's consumers, by the relative squared error, and needs `sites`.
        sites: as found in the original.
        temperature: logits are divided by it; the divergence is multiplied by its square.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        output_of: picks the output that matters out of what the model returns.
        logits: whether that output is logits; by default, whether the model calls it so.

    Raises:
        MethodError: the options contradict one another.
    """

    match: Match = "outputs"
    sites: Sites | None = None
    temperature: float = option(1.0, above=0)
    mask_of: MaskOf = default_mask_of
    output_of: OutputOf = default_output_of
    logits: bool | None = None

    def __post_init__(self) -> None:
        """Refuse options that contradict one another."""
        super().__post_init__()
        if (self.match == "sites") != (self.sites is not None):
            raise MethodError("match='sites' needs sites=, as found in the original, and nothing else takes them")

    @property
    def names(self) -> list[str]:
        """The layers whose outputs are compared."""
        return [] if self.sites is None else [m.name for site in self.sites for m in site.consumers]


def heal(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
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
        sh.heal(small, model, batches, sh.Recipe(epochs=2, lr=1e-4))

    Args:
        small: the model after surgery; its parameters that require a gradient are trained.
        dense: the model it was made from; it is not changed.
        batches: iterated once an epoch, with a length; labels are not read.
        recipe: how to train; by default one epoch of `healing.recipe`.
        matching: what is compared; by default the outputs.
        inputs_of: picks the model's inputs out of a batch.
        score: called with the model in eval mode after each epoch; higher is better.
        floor: lowest acceptable score; see `train`.
        checkpoint: a file (.safetensors), or a `Checkpoint`, that an interrupted run continues from.
        cpu: stay on the CPU even where there is an accelerator.

    Returns:
        What the training saw.

    Raises:
        MethodError: both models are one.
        SiteError: one of the models has no layer of that name.
        TrainingError: see `train`.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if small is dense:
        raise MethodError("small and dense are the same model: pass the one that surgery made, and the original")
    chosen = Matching() if matching is None else matching
    teacher = detached_copy(dense) if attached_places(dense) else dense
    with ExitStack() as stack:

        def distance(student: nn.Module, batch: Any) -> Tensor:
            inputs, mask = inputs_of(batch), chosen.mask_of(batch)
            device = model_device(student)
            if model_device(teacher) != device:
                stack.enter_context(placed(teacher, device))
            with evaluating(teacher), recorded(teacher, chosen.names, inputs=False) as there:
                wanted = call(teacher, inputs)
            with recorded(small, chosen.names, inputs=False, keep=_as_it_is) as here:
                given = call(student, inputs)
            if chosen.names:
                pairs = zip(tensors(here.outputs), tensors(there.outputs), strict=True)
                return torch.stack([relative_divergence(a, b, mask) for a, b in pairs]).mean()
            return _distance(given, wanted, mask, chosen)

        options: dict[str, Any] = {"score": score, "floor": floor, "checkpoint": checkpoint, "cpu": cpu}
        how = _default_recipe(epochs=1) if recipe is None else recipe
        return train(small, batches, distance, how, label="healing", **options)


def _distance(given: Any, wanted: Any, mask: Tensor | None, matching: Matching) -> Tensor:
    """How far one output is from the other."""
    categorical = are_logits(wanted) if matching.logits is None else matching.logits
    a, b = matching.output_of(given), matching.output_of(wanted)
    if categorical:
        return kl_divergence(a, b, mask, matching.temperature)
    return relative_divergence(a, b, mask)


def _as_it_is(tensor: Tensor) -> Tensor:
    """With its history, for the backward pass."""
    return tensor


_default_recipe = recipe
"""`heal` has an argument of that name."""
