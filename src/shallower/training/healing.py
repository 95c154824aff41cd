"""A short distillation after squeezing: the small network is trained to do what the original does.

    history = sh.heal(small, dense, batches, sh.healing.recipe(epochs=2))

No labels are needed. Either the outputs are compared, or what every site gives to the rest of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, default_mask_of, model_device
from shallower.errors import MethodError, SiteError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.sites import Sites
from shallower.training.loop import History, Recipe, train

Match = Literal["outputs", "sites"]


def recipe(epochs: int, lr: float = 1e-4, seed: int = 0) -> Recipe:
    """How to heal: AdamW without weight decay, a short warm-up, then a cosine to zero."""
    return Recipe(epochs=epochs, lr=lr, weight_decay=0.0, warmup=0.05, seed=seed)


def heal(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    match: Match = "outputs",
    sites: Sites | None = None,
    temperature: float = 1.0,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
    output_of: OutputOf = default_output_of,
    logits: bool | None = None,
    score: Callable[[nn.Module], float] | None = None,
    floor: float | None = None,
    checkpoint: str | Path | None = None,
    label: str = "healing",
    cpu: bool = False,
) -> History:
    """Train `small`, in place, to do what `dense` does.

        small = sh.apply(model, plan, example_inputs)
        sh.heal(small, model, batches, healing.recipe(epochs=2))

    Args:
        small: the model after surgery; its parameters that require a gradient are trained.
        dense: the model it was made from; it is not changed.
        batches: iterated once an epoch, with a length; labels are not read.
        recipe: how to train; `healing.recipe` is a good start.
        match: "outputs" compares what the models return: of logits the Kullback-Leibler divergence of the
            distributions, else the squared error, relative to the size of what is wanted. "sites" compares what each
            site's consumers give, by the relative squared error, and needs `sites`.
        sites: as found in `dense`.
        temperature: logits are divided by it; the divergence is multiplied by its square.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        output_of: picks the output that matters out of what the model returns.
        logits: whether that output is logits; by default, whether the model names it so.
        score: called with the model in eval mode after each epoch; higher is better.
        floor: lowest acceptable score; see `training.train`.
        checkpoint: a file (.safetensors) that an interrupted run goes on from.
        label: what the progress bar says.
        cpu: stay on the CPU even where there is an accelerator.

    Returns:
        What the training saw.

    Raises:
        MethodError: the options contradict one another.
        TrainingError: see `training.train`.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if temperature <= 0:
        raise MethodError(f"temperature={temperature!r}: it is greater than 0")
    if match not in ("outputs", "sites"):
        raise MethodError(f"match={match!r}: choose 'outputs' or 'sites'")
    if (match == "sites") != (sites is not None):
        raise MethodError("sites= are needed to match them (match='sites'), and for nothing else")
    if small is dense:
        raise MethodError("small and dense are the same model; give the one that surgery made, and the original")
    teacher = detached_copy(dense) if attached_places(dense) else dense
    names = [] if sites is None else [m.name for site in sites for m in site.consumers]

    def distance(student: nn.Module, batch: Any) -> Tensor:
        inputs = inputs_of(batch)
        where = model_device(student)
        if model_device(teacher) != where:
            teacher.to(where)
        mask = default_mask_of(batch) if mask_of is None else mask_of(batch)
        teacher.eval()
        with torch.no_grad(), recorded(teacher, names) as there:
            raw = call(teacher, inputs)
        with recorded(small, names) as here:
            given = output_of(call(student, inputs))
        if names:
            parts = [_relative(a, b, mask) for name in names for a, b in zip(here[name], there[name], strict=True)]
            return torch.stack(parts).mean()
        wanted = output_of(raw)
        categorical = hasattr(raw, "logits") if logits is None else logits
        return _divergence(given, wanted, mask, temperature) if categorical else _relative(given, wanted, mask)

    modes = [(module, module.training) for module in teacher.modules()]
    try:
        return train(
            small, batches, distance, recipe, score=score, floor=floor, checkpoint=checkpoint, label=label, cpu=cpu
        )
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers of these names return while the context lasts, call by call.

    Raises:
        SiteError: the model has no such layer.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    try:
        for name, outputs in found.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise SiteError(f"{name}: the model has no such layer; were the sites found in the original?") from None
            handles.append(module.register_forward_hook(lambda _m, _i, output, kept=outputs: kept.append(output)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _divergence(given: Tensor, wanted: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Mean over positions of KL(wanted || given) of logits (..., classes)."""
    there = (wanted.float() / temperature).log_softmax(-1)
    here = (given.float() / temperature).log_softmax(-1)
    each = (there.exp() * (there - here)).sum(-1) * temperature**2
    return _counted(each, mask).mean()


def _relative(given: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over the square of what is wanted."""
    a, b = _counted(given.float(), mask), _counted(wanted.float(), mask)
    error: Tensor = (a - b).square().sum() / b.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return error


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Positions that are not padding, where the mask has the first dimensions of `values`."""
    if mask is None or values.shape[: mask.dim()] != mask.shape:
        return values
    return values[mask.to(values.device).bool()]
