"""Accelerate for the length of one training, and no longer: its state, the model's device, the model's forward.

with started("bf16", cpu=False) as accelerator, placed(model, accelerator.device):
    with prepared(accelerator, model, optimizer) as pair:
        pair.model(batch)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.tensor import DTensor

from shallower.core.inputs import model_device
from shallower.errors import TrainingError

_PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What `prepare` puts on a model, for mixed precision."""


@contextmanager
def started(precision: str, cpu: bool) -> Iterator[Accelerator]:
    """An Accelerator of this precision; one that the caller may have stays as it is.

    Raises:
        TrainingError: the device does not compute in this precision.
    """
    # Accelerate keeps precision and gradient accumulation in singletons and has no public way to have two of them, or
    # to put one back: a second run of another precision would fail, and the caller's own Accelerator would change.
    singletons = (AcceleratorState._shared_state, GradientState._shared_state)
    before = [dict(state) for state in singletons]
    for state in singletons:
        state.clear()
    try:
        try:
            accelerator = Accelerator(mixed_precision=precision, cpu=cpu or not torch.accelerator.is_available())
        except ValueError as error:
            if "mixed precision" not in str(error):
                raise
            raise TrainingError(f"precision={precision!r} does not run on this device: {error}") from error
        yield accelerator
    finally:
        for state, then in zip(singletons, before, strict=True):
            state.clear()
            state.update(then)


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`, and back where it was."""
    home = model_device(model)
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        # Sharded weights belong to the devices of their mesh.
        if not any(isinstance(p, DTensor) for p in model.parameters()):
            model.to(home)


class Prepared:
    """The model and the optimizer as Accelerate wants them.

    Attributes:
        model: what is called in training; the model itself, or its wrapper for several processes.
        optimizer: what steps.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._bare = model
        self._own = _patches(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @contextmanager
    def own_forward(self) -> Iterator[nn.Module]:
        """The bare model with its own forward, for scores: a copy made there must not call this model's."""
        theirs = _patches(self._bare)
        self.close()
        try:
            yield self._bare
        finally:
            _patch(self._bare, theirs)

    def close(self) -> None:
        """Give the model its own forward back."""
        _patch(self._bare, self._own)


@contextmanager
def prepared(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Prepared]:
    """The model and the optimizer prepared; the model has its own forward again afterwards."""
    pair = Prepared(accelerator, model, optimizer)
    try:
        yield pair
    finally:
        pair.close()


def _patches(model: nn.Module) -> dict[str, Any]:
    return {name: vars(model)[name] for name in _PATCHES if name in vars(model)}


def _patch(model: nn.Module, values: Mapping[str, Any]) -> None:
    for name in _PATCHES:
        vars(model).pop(name, None)
    vars(model).update(values)
