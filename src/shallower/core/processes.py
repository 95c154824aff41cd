"""What several processes of `torch.distributed` have to agree on. In one process nothing happens.

    total = summed(gram)                        # over all processes
    with raised_anywhere():                     # an error of one process is an error of all
        read(batches)

Every function here that mentions all processes must be called by all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from shallower.errors import ShallowerError

T = TypeVar("T")


def several() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process, or the first."""
    return not several() or distributed.get_rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if several():
        distributed.barrier()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in float64 or, of whole numbers, in int64; the argument is untouched.

        moments = summed(x.T @ x)

    It is on the tensor's own device, or on the CPU where that has no float64.
    """
    wide = torch.int64
    if tensor.is_floating_point():
        wide = torch.float64
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    if not several():
        return tensor.to(wide)
    # a copy even where nothing has to be converted: the reduction writes into it
    total = tensor.to(_device(tensor.device), wide, copy=True).contiguous()
    distributed.all_reduce(total)
    return total.to(tensor.device)


def summed_over_processes(*values: float) -> tuple[float, ...]:
    """Sums of numbers over all processes."""
    if not several():
        return values
    return tuple(summed(torch.tensor(values, dtype=torch.float64)).tolist())


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; tensors in them should be on the CPU."""
    if not several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def agreed(value: T) -> T:
    """The first process's value, in all processes."""
    return from_first_process(lambda: value)


def all_agree(value: object) -> bool:
    """Whether the value is equal in all processes.

    if not all_agree(digest):
        raise DataError("the processes read different data")
    """
    first, *others = gathered(value)
    return all(other == first for other in others)


def from_first_process(compute: Callable[[], T]) -> T:
    """What `compute` returns in the first process, in all of them; for what differs by chance, such as a latency.

    Raises:
        ShallowerError: the first process raised an error; then all do.
    """
    if not several():
        return compute()
    found: list[Any] = [None]
    with raised_anywhere():
        if is_first():
            found = [compute()]
    distributed.broadcast_object_list(found)
    result: T = found[0]
    return result


@contextmanager
def raised_anywhere() -> Iterator[None]:
    """An error that is raised within in one process is raised at the end in all of them.

    Without it the others would wait for ever in the next sum. Nothing within may itself wait for other processes.

    Raises:
        ShallowerError: another process raised an error; of the same class where that is one of Shallower's.
    """
    if not several():
        yield
        return
    own: BaseException | None = None
    sent: tuple[type[ShallowerError], str] | None = None
    try:
        yield
    except Exception as error:
        own, sent = error, _as_sent(error)
    # its own error keeps its traceback; of the others' only class and text travel
    found = gathered(sent)
    if own is not None:
        raise own
    for failure in found:
        if failure is not None:
            kind, text = failure
            raise kind(text)


def _as_sent(error: BaseException) -> tuple[type[ShallowerError], str]:
    if isinstance(error, ShallowerError):
        return type(error), str(error)
    return ShallowerError, f"another process failed: {type(error).__name__}: {error}"


def _device(own: torch.device) -> torch.device:
    """Where the process group can add up a tensor of this device."""
    served = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    if own.type in served:
        return own
    if "cpu" in served:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return own
    return accelerator
