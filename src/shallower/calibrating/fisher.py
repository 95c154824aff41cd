"""What a network's output makes of a change at a layer: second moments of gradients.

    metrics = output_metrics(model, ["layer.0.output", "layer.1.output"], batches)
    change = delta @ metrics["layer.0.output"].zz @ delta       # expected change of the model's output

For logits the change is twice the Kullback-Leibler divergence of the predicted distributions, for any other output the
squared difference; both to second order.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.grams import Centred, Gram
from shallower.calibrating.patches import check_mask, flat, flat_mask, unmasked
from shallower.core.batches import Batch, Batches
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device
from shallower.core.memory import in_pieces
from shallower.core.modes import evaluating
from shallower.core.outputs import are_logits
from shallower.core.processes import gathered, raised_anywhere, summed_over_processes
from shallower.core.text import listing
from shallower.core.trees import cut, rows_of, tensors
from shallower.core.watching import After, watching
from shallower.errors import FitError, ForwardError
from shallower.modules.offloading import held_bytes

_ROOM = 1 << 27
"""Bytes that a backward pass may keep; of larger models as much as their weights take."""

_SAME = 1e-3
"""Relative difference up to which a part of a batch gets the outputs that it gets in the whole batch."""

_logger = logging.getLogger(__name__)

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
    for tensor in tensors(output):
        if tensor.is_floating_point():
            return tensor
    raise FitError("the model returns no floating-point tensor; say with output_of= what its output is")


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
    thin: int = 1,
) -> dict[str, Centred]:
    """For each layer second moments: `zz` (d, d) is the mean over positions of g g^T, g the gradient at its output.

        metrics = output_metrics(model, ["encoder.layer.0.output.dense"], batches)

    The gradients are of a random projection of the model's output, so that their second moment is, in expectation, the
    Gauss-Newton matrix of the squared error, or the Fisher matrix of the predicted distribution. Layers that no
    gradient reaches (the model runs them under `torch.no_grad`) are left out, which is logged.

    Args:
        model: left as it was.
        names: of layers whose output has its channels last, or in dimension 1 of a convolution.
        batches: read once here. Those whose backward pass needs much memory run in parts, where their rows are
            independent.
        inputs_of, mask_of: pick inputs and mask out of a batch; masked positions of the output do not count either.
        output_of: picks the output out of what the model returns.
        logits: whether the output is logits of classes in its last dimension; by default, whether the model returns
            something that has `logits`.
        seed: of the random projections.
        thin: of each batch one row in so many is used, where its rows are independent.

    Raises:
        FitError: there are no batches, `mask_of` returns a mask that fits no layer, or a gradient is not finite; the
            error names the layer. What one process raises, all raise.

    Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015,
    section 2, for the sampled Fisher matrix.
    """
    gradients = _Gradients(model, names)
    generator = torch.Generator().manual_seed(seed)
    device = model_device(model)

    def backward(batch: Batch) -> None:
        here = batch.on(device)
        mask = here.mask
        gradients.begin(mask)
        raw = call(model, here.inputs)
        check_mask(here, gradients.rows)
        output = output_of(raw)
        classes = logits
        if classes is None:
            classes = are_logits(raw)
        direction = _direction(output, classes, generator)
        if mask is not None and output.dim() == 3 and output.shape[:2] == mask.shape:
            direction = direction * mask.to(direction)[..., None]
        if output.requires_grad:
            torch.autograd.backward(output, direction)

    with raised_anywhere(), ExitStack() as stack:
        calibration = Batches.read(batches, inputs_of, mask_of)
        room = max(_ROOM, held_bytes(model))
        if len(calibration) and not rows_are_independent(model, calibration[0].on(device).inputs, output_of):
            room, thin = sys.maxsize, 1
        stack.enter_context(evaluating(model, gradients=True))
        stack.callback(_require_no_gradients(model))
        stack.enter_context(watching(model, after={name: gradients.after(name) for name in names}))
        bar = tqdm(calibration, desc="measuring sensitivity", delay=5, leave=False)
        in_pieces(_some_rows(bar, thin), model, room, backward)
    if not summed_over_processes(calibration.rows)[0]:
        raise FitError("calibration needs data: `batches` is empty. Give a few hundred samples")
    return gradients.found()


def _some_rows(batches: Iterable[Batch], thin: int) -> Iterator[Batch]:
    """One row in so many of each batch; all where it cannot be cut."""
    for batch in batches:
        if thin > 1 and rows_of(batch.inputs) is not None:
            batch = cut(batch, slice(None, None, thin))
        yield batch


class _Gradients:
    """Second moments of the gradients at the outputs of some layers.

    Attributes:
        mask: positions that count in the batch that runs, flattened; None for all.
        rows: how many positions the layers have in it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.begin(None)
        self._names = names
        self._device = model_device(model)
        self._sums: dict[str, Gram] = {}

    def begin(self, mask: Tensor | None) -> None:
        """A batch is about to run."""
        self.mask = flat_mask(mask)
        self.rows: list[int] = []

    def after(self, name: str) -> After:
        """A hook that lets gradients begin at the layer's output, and adds up those that come back to it."""

        def after(module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor | None:
            if torch.is_inference_mode_enabled():
                return None
            if not output.requires_grad:
                # the model may run this part under no_grad, where what comes after takes no gradient either;
                # an in-place operation may follow, and is not allowed on a leaf
                with torch.enable_grad():
                    start = output.clone() if output.is_inference() else output.detach()
                    output = start.requires_grad_().clone()
            images = isinstance(module, nn.Conv2d)
            if output.numel():
                self.rows.append(len(flat(output, images)))
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda g: self._add(name, unmasked(flat(g, images), self.mask))
            )
            return output

        return after

    def _add(self, name: str, gradients: Tensor) -> None:
        if name in self._sums:
            self._sums[name] = self._sums[name].seen(gradients)
        else:
            self._sums[name] = Gram.of(gradients)

    def found(self) -> dict[str, Centred]:
        """The means over all positions of all processes."""
        # a process that a layer's gradient did not reach takes part in the sums all the same
        sizes: dict[str, int] = {}
        for own in gathered({name: gram.columns for name, gram in self._sums.items()}):
            sizes |= own
        found = {}
        for name in self._names:
            if name not in sizes:
                continue
            total = self._sums.get(name, Gram(sizes[name], 0, device=self._device)).over_processes()
            if not total.is_finite():
                raise FitError(f"{name}: the gradients at its output are not finite on the calibration batches")
            if total.count:
                found[name] = total.centred(intercept=False)
        if missing := [name for name in self._names if name not in found]:
            _logger.warning(
                "no gradient reaches %s: their outputs count alike, as with sensitivity=False",
                listing(missing),
            )
        return found


def _require_no_gradients(model: nn.Module) -> Callable[[], None]:
    """Let no parameter take gradients; the result undoes it."""
    required = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for parameter in required:
        parameter.requires_grad_(False)

    def undo() -> None:
        for parameter in required:
            parameter.requires_grad_(True)

    return undo


def rows_are_independent(model: nn.Module, inputs: Any, output_of: OutputOf) -> bool:
    """Whether half of a batch gets the outputs that it gets in the whole, so that a batch may run in parts.

        rows_are_independent(model, inputs, default_output_of)

    Not so where dimension 0 is no batch: time, the nodes of a graph, the points of one cloud.
    """
    rows = rows_of(inputs)
    if rows is None or rows < 2:
        return True  # such a batch is never divided
    half = slice(0, rows // 2)
    with evaluating(model):
        whole = output_of(call(model, inputs))
        try:
            part = output_of(call(model, cut(inputs, half)))
        except ForwardError:
            return False
    if whole.dim() == 0 or len(whole) != rows or part.shape != whole[half].shape:
        return False
    missed = (whole[half] - part).float().norm()
    return bool(missed <= _SAME * part.float().norm())


def _direction(output: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """A random vector v with E[v v^T] the second derivative of the divergence at the output."""
    with torch.no_grad():
        if not logits:
            return torch.randn(output.shape, generator=generator).to(output)
        probabilities = output.detach().float().softmax(-1)
        flat = probabilities.reshape(-1, probabilities.shape[-1]).cpu()
        # for y drawn from p, v = p - one_hot(y) has E[v v^T] = diag(p) - p p^T
        drawn = torch.multinomial(flat, 1, generator=generator).to(output.device)
        chosen = torch.zeros_like(probabilities).reshape(flat.shape).scatter_(1, drawn, 1.0)
        return (probabilities - chosen.view_as(probabilities)).to(output)
