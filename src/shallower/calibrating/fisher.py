"""What a network's output makes of a change at a layer: second moments of gradients.

    metrics = output_metrics(model, ["layer.0.output", "layer.1.output"], batches)
    change = delta @ metrics["layer.0.output"] @ delta          # expected change of the model's output

For logits the change is twice the Kullback-Leibler divergence of the predicted distributions, for any other output the
squared difference; both to second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.grams import Centred, Gram
from shallower.core.inputs import (
    InputsOf,
    MaskOf,
    call,
    default_inputs_of,
    default_mask_of,
    model_device,
    reiterable,
    tensors,
    to_device,
)
from shallower.core.memory import in_pieces
from shallower.core.modes import evaluating
from shallower.errors import FitError
from shallower.modules.offloading import held_bytes

_ROOM = 1 << 27
"""Bytes that a backward pass may keep; of larger models as much as their weights take."""

OutputOf = Callable[[Any], Tensor]
"""Picks, out of what the model returns, the tensor that matters."""


def default_output_of(output: Any) -> Tensor:
    """The logits of a Transformers output, or else the first floating-point tensor.

    Raises:
        FitError: there is none.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = next((t for t in tensors(output) if t.is_floating_point()), None)
    if found is None:
        raise FitError("the model returns no floating-point tensor; say with output_of= what its output is")
    return found


def output_metrics(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
    output_of: OutputOf = default_output_of,
    logits: bool | None = None,
    seed: int = 0,
) -> dict[str, Centred]:
    """For each layer second moments: `zz` (d, d) is the mean over positions of g g^T, g the gradient at its output.

    The gradients are of a random projection of the model's output, so that their second moment is, in expectation, the
    Gauss-Newton matrix of the squared error, or the Fisher matrix of the predicted distribution.

    Args:
        model: left as it was.
        names: of layers whose output has its channels last, or in dimension 1 of a convolution.
        batches: read once here.
        inputs_of, mask_of: see `statistics.collect`; masked positions of the output do not count either.
        output_of: picks the output out of what the model returns.
        logits: whether the output is logits of classes in its last dimension; by default, whether the model returns
            something that has `logits`.
        seed: of the random projections.

    Raises:
        FitError: there are no batches, or a gradient is not finite; the error names the layer.

    Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015,
    section 2, for the sampled Fisher matrix.
    """
    reiterable(batches)
    device = model_device(model)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Gram] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                # an in-place operation may follow, and is not allowed on a leaf
                output = output.detach().requires_grad_().clone()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda g: add(name, g.movedim(1, -1) if isinstance(module, nn.Conv2d) else g)
            )
            return output

        return hook

    def add(name: str, gradient: Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1])
        if mask is not None and len(mask) == len(g):
            g = g[mask]
        sums[name] = sums[name].seen(g) if name in sums else Gram.of(g)

    def one(batch: Any) -> None:
        nonlocal mask
        given = default_mask_of(batch) if mask_of is None else mask_of(batch)
        mask = None if given is None else given.to(device).bool().flatten()
        with torch.enable_grad():
            raw = call(model, to_device(inputs_of(batch), device))
            output = output_of(raw)
            categorical = hasattr(raw, "logits") if logits is None else logits
            direction = _direction(output, categorical, generator)
            if given is not None and output.dim() == 3 and output.shape[:2] == given.shape:
                direction = direction * given.to(direction)[..., None]
            torch.autograd.backward(output, direction)

    required = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(lambda: [p.requires_grad_(True) for p in required])
        for parameter in required:
            parameter.requires_grad_(False)
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            stack.callback(handle.remove)
        room = max(_ROOM, held_bytes(model))
        in_pieces(tqdm(batches, desc="measuring sensitivity", delay=5, leave=False), model, room, one)
    if not sums:
        raise FitError("no batches to calibrate on, or no layer that the output depends on")
    found = {}
    for name in [name for name in names if name in sums]:
        total = sums[name].over_processes()
        if not total.is_finite():
            raise FitError(f"{name}: the gradients at its output are not finite on the calibration batches")
        found[name] = total.centred(intercept=False)
    return found


def _direction(output: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """A random vector v with E[v v^T] the second derivative of the divergence at the output."""
    with torch.no_grad():
        if not logits:
            return torch.randn(output.shape, generator=generator).to(output)
        probabilities = output.detach().float().softmax(-1)
        flat = probabilities.reshape(-1, probabilities.shape[-1]).cpu()
        drawn = torch.multinomial(flat, 1, generator=generator).to(output.device)
        chosen = torch.zeros_like(probabilities).reshape(flat.shape).scatter_(1, drawn, 1.0)
        return (probabilities - chosen.view_as(probabilities)).to(output)
