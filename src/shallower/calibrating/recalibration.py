"""BatchNorm statistics measured again, after the network in front of them has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.processes import raised_anywhere, summed, summed_over_processes
from shallower.core.tensors import are_finite
from shallower.errors import FitError


def recalibrate(model: nn.Module, batches: Iterable[Any], *, inputs_of: InputsOf = default_inputs_of) -> int:
    """Replace the running mean and variance of every BatchNorm by those over the batches, in place.

        small = sh.apply(model, plan, example_inputs)
        sh.recalibrate(small, batches)

    Helps where much was taken away: activations of a strongly squeezed network vary less than the BatchNorms expect.
    A BatchNorm that does not run keeps its statistics, and where anything goes wrong all do. Of several processes all
    call it, each with batches of its own, and all get the statistics over all of them.

    Args:
        model: its weights and modes are left as they are.
        batches: read once, at least a few hundred samples.
        inputs_of: picks the model's inputs out of a batch.

    Returns:
        How many BatchNorms there are.

    Raises:
        FitError: there are no batches, or what a BatchNorm reads is not finite; the error names it.
        ForwardError: the model does not run on a batch.
        SiteError: the batches are a one-shot iterator.
    """
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            norms[name] = module
    if not norms:
        return 0
    before = {name: _statistics(norm) for name, norm in norms.items()}
    try:
        with raised_anywhere():
            calibration = Batches.read(batches, inputs_of)
            _measure(model, list(norms.values()), calibration)
        if not summed_over_processes(calibration.rows)[0]:
            raise FitError("recalibration needs data: `batches` is empty. Give a few hundred samples")
        for name, norm in norms.items():
            _mean_over_processes(norm)
            if not are_finite(_statistics(norm)):
                raise FitError(f"{name}: what it reads on these batches is not finite; do they hold NaN?")
    except BaseException:
        for name, norm in norms.items():
            _put_back(norm, before[name])
        raise
    for name, norm in norms.items():
        if not norm.num_batches_tracked:
            _put_back(norm, before[name])
    return len(norms)


def _measure(model: nn.Module, norms: list[_BatchNorm], batches: Batches) -> None:
    """Let the norms take the mean of the statistics of all batches.

    Not by `torch.optim.swa_utils.update_bn`: that puts the whole model into training mode, dropout with it, and takes
    of every batch the first tensor.
    """
    momenta = [norm.momentum for norm in norms]
    device = model_device(model)
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                # without a momentum it takes the plain mean of all batches
                norm.momentum = None
            for batch in tqdm(batches, desc="measuring BatchNorms", delay=5, leave=False):
                call(model, batch.on(device).inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def _mean_over_processes(norm: _BatchNorm) -> None:
    """Let a norm take the mean of the statistics of all batches of all processes."""
    counted = cast("Tensor", norm.num_batches_tracked)
    total = summed(counted)
    for buffer in (norm.running_mean, norm.running_var):
        if buffer is not None and total.item():
            buffer.copy_(summed(buffer.double() * counted) / total)
    counted.copy_(total)


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    """Copies of the buffers."""
    return [buffer.detach().clone() for buffer in norm.buffers()]


@torch.no_grad()
def _put_back(norm: _BatchNorm, statistics: list[Tensor]) -> None:
    for buffer, value in zip(norm.buffers(), statistics, strict=True):
        buffer.copy_(value)
