"""What went wrong, as one line that names the place: the end of every failure on the command line.

    print(f"error: {one_line(error)}", file=sys.stderr)

SHALLOWER_DEBUG=1 or `shallower --debug` prints the traceback as well.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from shallower.errors import ShallowerError

DEBUG = "SHALLOWER_DEBUG"
"""The environment variable that asks for tracebacks."""

_SOON = 0.05
"""Seconds after which an interruption that was lost comes again."""

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARY_FOLDERS = (*{str(Path(path)) for path in sysconfig.get_paths().values()}, "<")


def one_line(error: BaseException) -> str:
    """The sentence for an error: its own words where it was raised on purpose, else what it is and where it arose.

    one_line(KeyError("x"))     # KeyError: 'x', in forward (nets.py, line 31); ...
    """
    if isinstance(error, ShallowerError):
        return " ".join(str(error).split())
    # It knows the errors of PyTorch, which is loaded by now if one of them was raised.
    from shallower.core.failures import is_out_of_memory, sentence

    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {sentence(error)}"
    told = f"{sentence(error)}, {_place(error)}"
    if is_out_of_memory(error):
        return f"{told}: use smaller batches or inputs (--batch-size, --length, --image-size)"
    return f"{told}; {DEBUG}=1 prints the traceback"


def _place(error: BaseException) -> str:
    """Where an error arose: in the user's code if any of it ran, else where this package called another."""
    own, foreign = [], []
    frames = traceback.extract_tb(error.__traceback__)
    for frame in frames:
        if frame.filename.startswith(_PACKAGE):
            own.append(frame)
        elif not frame.filename.startswith(_LIBRARY_FOLDERS):
            foreign.append(frame)
    if not frames:
        return "nowhere known"
    frame = (foreign or own or frames)[-1]
    return f"in {frame.name} ({Path(frame.filename).name}, line {frame.lineno})"


@contextmanager
def foreign_code(kind: type[ShallowerError], where: str) -> Iterator[None]:
    """Let what fails in code of the user's, or ends the program there, be one sentence that says where in it.

    with foreign_code(ModelError, "my.nets:make"):
        factory()

    Raises:
        kind: anything but an error of Shallower was raised.
        OutOfMemoryError: there is not enough memory.
    """
    from shallower.core.failures import failing

    try:
        yield
    except SystemExit as error:
        raise kind(f"{where} ended the program: sys.exit({error.code!r}) was called") from error
    except Exception as error:
        with failing(kind, f"{where}, {_place(error)}"):
            raise


def on_stderr(text: str) -> None:
    """Say something to whoever waits, apart from what a program may read."""
    print(text, file=sys.stderr)


def print_traceback(error: BaseException) -> None:
    """The traceback on stderr, where it was asked for."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)


@contextmanager
def terminable() -> Iterator[None]:
    """Meanwhile a SIGTERM ends the work as Ctrl-C does: what was done is kept, and nothing half-written stays.

    Where an interruption arrives in a finaliser, out of which Python lets no exception go, it comes once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    def repeat(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            others(lost)
            return
        again.append(threading.Timer(_SOON, _thread.interrupt_main, (signal.SIGTERM,)))
        again[-1].start()

    again: list[threading.Timer] = []
    before, others = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = others
        signal.signal(signal.SIGTERM, before)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Meanwhile a warning is a line on stderr, without the line of code that raised it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
