"""BatchNorm statistics measured again, after the network in front of them has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.core.inputs import InputsOf, call, default_inputs_of, model_device, reiterable, to_device


def recalibrate(model: nn.Module, batches: Iterable[Any], *, inputs_of: InputsOf = default_inputs_of) -> int:
    """Replace the running mean and variance of every BatchNorm by those over the batches, in place.

        small = sh.apply(model, plan, example_inputs)
        recalibrate(small, batches)

    Helps where much was taken away: activations of a strongly squeezed network vary less than the BatchNorms expect.

    Args:
        model: its weights and modes are left as they are.
        batches: read once, at least a few hundred samples.
        inputs_of: picks the model's inputs out of a batch.

    Returns:
        How many BatchNorms there are.
    """
    reiterable(batches)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    device = model_device(model)
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for batch in batches:
                call(model, to_device(inputs_of(batch), device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return len(norms)
