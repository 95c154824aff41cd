"""What goes wrong in a user's model, data or disk, as one sentence.

with failing(CheckpointError, f"{path}: cannot be written"):
    save_file(tensors, path)
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shallower.errors import ForwardError, OutOfMemoryError, ShallowerError

_ALLOCATION = re.compile(r"allocate (?:an array .*? requires )?([\d.]+ ?\w+)")
_EXHAUSTED = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "bad_alloc")
_LONGEST = 600


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is any library's way to say that there is not enough memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _EXHAUSTED)


def sentence(error: BaseException) -> str:
    """The error in a few words, on one line.

    sentence(OSError(28, "No space left on device"))    # "No space left on device"
    """
    if isinstance(error, ShallowerError):
        return str(error)
    if is_out_of_memory(error):
        asked = _ALLOCATION.search(str(error).replace("you tried to", "tried to"))
        if asked:
            return f"out of memory ({asked[1]} asked for)"
        return "out of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    kind, text = type(error).__name__, " ".join(str(error).split())
    if not text:
        return kind
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    return f"{kind}: {text}"


@contextmanager
def failing(
    error: type[ShallowerError], where: str, advice: str = "", *, through: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Let whatever fails within be one sentence: where, what, and what to do.

    Errors of Shallower pass unchanged, except that one of a model's forward pass also says where it was.

        with failing(ExportError, f"{path}: cannot be written", "Give another path"):
            ...

    Args:
        error: the class to raise.
        where: how the sentence begins.
        advice: how it ends.
        through: other exceptions that pass unchanged.

    Raises:
        OutOfMemoryError: instead of `error`, where there is not enough memory.
    """
    passing: tuple[type[BaseException], ...] = (ShallowerError, *through)
    try:
        yield
    except ForwardError as cause:
        raise error(f"{where}: {cause}") from cause
    except passing:
        raise
    except Exception as cause:
        text = f"{where}: {sentence(cause)}"
        if is_out_of_memory(cause):
            raise OutOfMemoryError(f"{text}. Use smaller batches, or a device with more memory") from cause
        if advice:
            text = f"{text}. {advice}"
        raise error(text) from cause
