"""What several processes of `torch.distributed` have to agree on. In one process nothing happens.

    total = summed(gram)                        # over all processes
    with raised_anywhere():                     # an error of one process is an error of all
        total = summed(gram_of(batches))

Every function here that mentions all processes must be called by all of them, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, distributed

from shallower.core.trees import to_device
from shallower.errors import ShallowerError

P = ParamSpec("P")
T = TypeVar("T")

_depth: ContextVar[int] = ContextVar("_depth", default=0)
"""How many contexts of `raised_anywhere` this process is in."""


def several() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process, or the first."""
    return not several() or distributed.get_rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if several():
        _stop_where_one_failed()
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
    _stop_where_one_failed()
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
    _stop_where_one_failed()
    return _all_of(value)


def added(value: T | None) -> T | None:
    """What all processes have, added up in the order of their ranks; None where none of them has anything.

        moments = added(moments)

    In one process it is the value itself, in several its tensors are on the CPU.
    """
    if not several():
        return value
    total: Any = None
    for found in gathered(to_device(value, "cpu")):
        if total is None:
            total = found
        elif found is not None:
            total = total + found
    return cast("T | None", total)


def agreed(value: T) -> T:
    """The first process's value, in all processes."""
    return from_first_process(lambda: value)


def agreed_result(compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function returns in the first process, in all of them, which all call it: a sharded model needs them.

        value = agreed_result(score, model)

    Raises:
        ShallowerError: one of the processes raised an error; then all do.
    """
    with raised_anywhere():
        return agreed(compute(*args, **kwargs))


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
    """An error that is raised within in one process is raised in all of them.

    The others raise it where they next wait for that process: at the end, or before that in a sum or another function
    of this module. Without this they would wait for ever. It may stand around a whole computation, and within another
    of its kind. What waits for other processes by itself, such as the backward pass of a wrapped model, may not stand
    within.

    Raises:
        ShallowerError: another process raised an error; of the same class where that is one of Shallower's.
    """
    if not several():
        yield
        return
    depth = _depth.get() + 1
    token = _depth.set(depth)
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    finally:
        _depth.reset(token)
    # its own error keeps its traceback; of the others' only class and text travel
    sent = None
    if own is not None:
        sent = _as_sent(own)
    others: ShallowerError | None = None
    while states := _states(depth, sent):
        others = others or _error_in(states)
        if all(state.leaving <= depth for state in states):
            break  # else a process is still within: it has now heard of it, and comes
    if own is not None:
        raise own
    if others is not None:
        raise others


_Failure = tuple[type[ShallowerError], str]
"""The class and the text of an error."""


@dataclass(frozen=True)
class _State:
    """Where a process meets the others.

    Attributes:
        leaving: the depth of the context of `raised_anywhere` that it leaves; more than any where it leaves none.
        failure: with which it leaves.
    """

    leaving: int
    failure: _Failure | None


def _stop_where_one_failed() -> None:
    """Raise what another process raises within the same context, instead of waiting for it.

    Raises:
        ShallowerError: see `raised_anywhere`.
    """
    if _depth.get() and (error := _error_in(_states(sys.maxsize, None))):
        raise error


def _states(leaving: int, failure: _Failure | None) -> list[_State]:
    """Where all processes are, if one of them has failed; nothing otherwise, which is found out quickly."""
    failed = torch.tensor([failure is not None], dtype=torch.int64, device=_device(torch.device("cpu")))
    distributed.all_reduce(failed)
    if not failed.item():
        return []
    return _all_of(_State(leaving, failure))


def _error_in(states: list[_State]) -> ShallowerError | None:
    """The first process's error, of those that have one."""
    for state in states:
        if state.failure is not None:
            kind, text = state.failure
            return kind(text)
    return None


def _all_of(value: T) -> list[T]:
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _as_sent(error: Exception) -> _Failure:
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
