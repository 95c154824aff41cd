"""What of a recorded pass runs for one value only, and goes with it.

    region = Regions(trace).behind(value, reader)
    region.frames           # the module invocations that nothing else needs

A call is needed for a value alone where all that reads its results is. A module invocation is where all its calls are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

from shallower.recording.tracing import Call, Frame, Trace, Value


@dataclass(frozen=True)
class Region:
    """What runs for one value only.

    Attributes:
        calls: the calls, with those that nothing reads.
        frames: the outermost module invocations that do nothing else, in order of execution.
        loose: calls among them that no such invocation makes: the forward of a module around them does.
    """

    calls: frozenset[Call]
    frames: tuple[Frame, ...]
    loose: tuple[Call, ...]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulate operations of the invocations."""
        return sum(call.macs for frame in self.frames for call in frame.calls())


class Regions:
    """The regions of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.position = {call: i for i, call in enumerate(trace.calls)}
        self.cached = set(trace.cached)
        self.readers: dict[Value, list[Call]] = {}
        for call in trace.calls:
            if not _hands_on(call):
                for value in dict.fromkeys(map(origin, call.inputs)):
                    self.readers.setdefault(value, []).append(call)

    def behind(self, value: Value, reader: Call) -> Region:
        """What runs only so that `reader` can read `value`."""
        found = self._calls(value, reader)
        frames: list[Frame] = []
        gone: set[Frame] = set()
        inside: set[Call] = set()
        owners = {frame for call in found for frame in call.frame.ancestors()}
        for frame in self.trace.frames:  # those that enter others come first
            if frame.parent in gone:
                gone.add(frame)
                continue
            if frame not in owners or frame.parent is None:
                continue
            own = list(frame.calls())
            if all(call in found or not self._is_read(call) for call in own):
                frames.append(frame)
                gone.add(frame)
                inside.update(own)
        loose = tuple(call for call in self.trace.calls if call in found and call not in inside)
        return Region(frozenset(found), tuple(frames), loose)

    def _calls(self, value: Value, reader: Call) -> set[Call]:
        """The calls whose results are read by one another and, as `value`, by `reader` alone."""
        found: set[Call] = set()
        value = origin(value)
        if value.call is None or self.readers[value] != [reader]:
            return found
        waiting = [(-self.position[value.call], 0, value.call)]
        seen = {value.call}
        while waiting:  # the latest first, so that all that reads a result is known
            call = heapq.heappop(waiting)[2]
            if not self._only_for(call, found, value, reader):
                continue
            found.add(call)
            for read in map(origin, call.inputs):
                if read.call is not None and read.call not in seen:
                    seen.add(read.call)
                    heapq.heappush(waiting, (-self.position[read.call], len(seen), read.call))
        return found

    def _only_for(self, call: Call, found: set[Call], value: Value, reader: Call) -> bool:
        for output in call.outputs:
            if output.output and output not in self.cached:
                return False
            for other in self.readers.get(output, ()):
                if other in found or (output is value and other is reader):
                    continue
                if self._is_read(other) or not other.outputs:
                    return False
        return True

    def _is_read(self, call: Call) -> bool:
        """Whether something reads what a call gives."""
        if _hands_on(call):
            return False
        return any(output.output or self.readers.get(output) for output in call.outputs)


def origin(value: Value) -> Value:
    """The value itself, of one that a call only hands on (a conversion to the type that it has)."""
    while value.call is not None and _hands_on(value.call):
        value = value.call.inputs[0]
    return value


def _hands_on(call: Call) -> bool:
    """Whether a call gives the very tensor that it reads."""
    if call.inplace or len(call.outputs) != 1 or not call.inputs:
        return False
    return call.outputs[0].tensor == call.inputs[0].tensor
