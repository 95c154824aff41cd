"""What several processes of `torch.distributed` have to agree on. In one process nothing happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from shallower.errors import ShallowerError

T = TypeVar("T")


def several() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process, or the first."""
    return not several() or distributed.get_rank() == 0


def from_first_process(compute: Callable[[], T]) -> T:
    """What `compute` gives in the first process, in all of them; for what differs by chance, such as a latency.

    Raises:
        ShallowerError: the first process raised it; then all do.
    """
    if not several():
        return compute()
    found: list[Any] = [None]
    if is_first():
        try:
            found = [compute()]
        except ShallowerError as error:
            found = [error]
    distributed.broadcast_object_list(found)
    if isinstance(found[0], ShallowerError):
        raise found[0]
    result: T = found[0]
    return result


def summed_over_processes(*values: float) -> tuple[float, ...]:
    """Sums of numbers over all processes."""
    if not several():
        return values
    device = torch.accelerator.current_accelerator() if distributed.get_backend() == "nccl" else None
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return tuple(sums.tolist())
