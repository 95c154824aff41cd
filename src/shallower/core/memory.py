"""Less memory than one would need at once: batches in pieces, and what was freed given back.

in_pieces(batches, model, room=1 << 27, step=lambda batch: loss(model(batch)).backward())
give_back()
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.inputs import Stopped
from shallower.core.trees import cut, rows_of, tensors


class _TooLarge(Stopped):
    """A pass wants to keep more for its backward pass than there is room."""


def in_pieces(batches: Iterable[Any], model: nn.Module, room: int, step: Callable[[Any], None]) -> None:
    """Call `step` on each batch, or on halves of it, and of these again, until its backward pass has room.

    Args:
        batches: what is read.
        model: whose weights do not count.
        room: bytes that may be kept for a backward pass; a single sample may take more.
        step: a forward and a backward pass. It may be called again on a part of a batch for which it did not get to
            its backward pass.
    """
    smallest: float = torch.inf
    for whole in batches:
        waiting = [whole]
        while waiting:
            batch = waiting.pop(0)
            give_back()
            parts, size = halves(batch), sum(t.numel() for t in tensors(batch))
            if len(parts) == 1:
                step(batch)
                continue
            # what was too large once is so again: not to be tried
            try:
                if size >= smallest:
                    raise _TooLarge
                with _at_most(room, model):
                    step(batch)
            except _TooLarge:
                smallest = min(smallest, size)
                waiting = [*parts, *waiting]


@contextmanager
def _at_most(room: int, model: nn.Module) -> Iterator[None]:
    """Within, no more than so many bytes are kept for a backward pass; one that would need more raises."""
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = 0

    def keep(t: Tensor) -> Tensor | None:
        nonlocal kept
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        # an error in here would leave the model's own code in the middle of something
        if kept > room:
            return None
        return t

    def kept_one(t: Tensor | None) -> Tensor:
        if t is None:
            raise _TooLarge
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, kept_one):
        yield


def halves(batch: Any) -> list[Any]:
    """The two halves of a batch along dimension 0; the batch alone where it cannot be cut."""
    length = rows_of(batch)
    if length is None or length < 2:
        return [batch]
    middle = length // 2
    return [cut(batch, slice(0, middle)), cut(batch, slice(middle, None))]


def free_bytes() -> int:
    """Bytes of the machine's memory that nothing uses; 0 where that is not known."""
    return _bytes_of("SC_AVPHYS_PAGES")


def total_bytes() -> int:
    """Bytes of the machine's memory; 0 where that is not known."""
    return _bytes_of("SC_PHYS_PAGES")


def _bytes_of(pages: str) -> int:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def give_back() -> None:
    """Give memory that was freed back to the system, where the allocator (glibc's) keeps it."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
