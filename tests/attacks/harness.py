"""Loading what may be hostile: in a process of its own, with its time, memory and network watched."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from shallower.errors import ShallowerError

SECONDS = 20
MEMORY = 1 << 30


@dataclass
class Outcome:
    """What came of a call.

    Attributes:
        kind: "returned", "refused" (a ShallowerError), "crashed" (any other error), or "hung".
        text: the error.
        seconds: that it took.
        memory: bytes above what the process had before.
        contacts: addresses that it connected to, or tried to.
    """

    kind: str = "hung"
    text: str = ""
    seconds: float = SECONDS
    memory: int = 0
    contacts: list[str] = field(default_factory=list)

    @property
    def harmless(self) -> bool:
        """Whether it ended as it should: soon, in little memory, without network, and in no foreign error."""
        contained = self.seconds < SECONDS and self.memory < MEMORY and not self.contacts
        return self.kind in ("returned", "refused") and contained


def outcome(call: Callable[[], Any]) -> Outcome:
    """What comes of `call` in a copy of this process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(call, theirs))
    process.start()
    try:
        return ours.recv() if ours.poll(SECONDS) else Outcome()
    except EOFError:
        return Outcome("crashed", f"the process ended with {process.exitcode}", 0.0)
    finally:
        process.kill()
        process.join()


def _run(call: Callable[[], Any], connection: Connection) -> None:
    contacts: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            contacts.append(str(arguments[-1] if event == "socket.connect" else arguments[0]))
            raise OSError("no network here")

    sys.addaudithook(audit)
    before, start = _peak(), time.perf_counter()
    try:
        call()
        kind, text = "returned", ""
    except ShallowerError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = "crashed", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    connection.send(Outcome(kind, text[:2000], seconds, _peak() - before, contacts))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
