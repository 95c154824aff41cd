"""BatchNorm statistics around passes at other widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def with_statistics(model: nn.Module) -> list[Any]:
    """The norms of a model that keep running statistics."""
    return [module for module in model.modules() if has_statistics(module)]


def has_statistics(module: nn.Module) -> bool:
    """Whether this is a norm that keeps running statistics."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "momentum")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Norms normalise by their batch within, and leave running statistics and the count of batches as they are."""
    norms = with_statistics(model)
    before = [(norm, norm.momentum, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            # Without tracking a BatchNorm does not count the batch, which a cumulative mean (momentum=None) would feel;
            # an InstanceNorm updates its mean all the same, by the momentum.
            norm.momentum = 0.0
            norm.track_running_stats = False
        yield
    finally:
        for norm, momentum, tracks in before:
            norm.momentum, norm.track_running_stats = momentum, tracks


@contextmanager
def restored_statistics(model: nn.Module) -> Iterator[None]:
    """Running statistics come back as they were."""
    norms = with_statistics(model)
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
