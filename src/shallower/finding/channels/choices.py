"""Calls that choose among channels: where they are made, so that dropped channels can be kept from being chosen.

choices = choices_in(followed, CallPlaces(followed))
choices.refusal(run, slots)         # "" where every choice among its channels can be found again
choices.of(run)
"""

from __future__ import annotations

from collections.abc import Sequence

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, runs, spans
from shallower.finding.channels.rules.reducing import COMPARES
from shallower.recording.tracing import Call, Frame
from shallower.sites import Choice, Slot

ALL_CHOSEN = "all of its channels are chosen every time"


class Choices:
    """The choices among the channels of each run.

    Attributes:
        lost: runs with a choice that no forward makes at the same place every time, each with the call.
    """

    def __init__(self) -> None:
        self.lost: dict[Run, str] = {}
        self._found: dict[Run, dict[tuple[str, str, int], Choice]] = {}

    def of(self, run: Run) -> tuple[Choice, ...]:
        """Those among a run's channels."""
        return tuple(self._found.get(run, {}).values())

    def add(self, run: Run, choice: Choice) -> None:
        """One more."""
        self._found.setdefault(run, {})[choice.module, choice.function, choice.ordinal] = choice

    def refusal(self, f: Following, run: Run, slots: Sequence[Slot]) -> str:
        """Why a run that stands in these slots cannot be cut; "" where it can.

        Experts have weights of their own beside the rows of the router, or are the entries of a list.
        """
        if run in self.lost:
            return self.lost[run]
        lists = f.turns.lists_of(run)
        if lists is None:
            return "they are only some of the entries of a list"
        if not lists and not any(slot.side == "" and len(slot.shape) > 1 for slot in slots):
            first = self.of(run)[0]
            return f"`{first.function}` in {first.module or 'the model'} {COMPARES}"
        for choice in self.of(run):
            if choice.least >= choice.size:
                return ALL_CHOSEN
        return ""


def choices_in(f: Following, places: CallPlaces) -> Choices:
    """All choices among channels of a pass."""
    found = Choices()
    for layout, call, dim, least in f.choices:
        for run in dict.fromkeys(runs(layout)):
            if run.closed:
                continue
            place = places.of(call, dim, run)
            if place is None:
                found.lost[run] = f"{f.title(call)} {COMPARES}, among other channels in other calls"
                continue
            frame, ordinal = place
            own = tuple(spans(layout, run))
            found.add(run, Choice(frame.name or "", call.name, ordinal, dim, layout.size, own, least))
    return found


class CallPlaces:
    """Where calls are made that read channels, so that they can be found again.

    places = CallPlaces(followed)
    places.of(call, -1, run)        # the module, and how many calls of that name come before
    """

    def __init__(self, f: Following) -> None:
        self._f = f
        self._frames: dict[str, list[Frame]] = {}
        self._calls: dict[tuple[Frame, str], list[Call]] = {}
        for frame in f.trace.frames:
            if frame.name is not None:
                self._frames.setdefault(frame.name, []).append(frame)

    def of(self, call: Call, dim: int, run: Run) -> tuple[Frame, int] | None:
        """The innermost module all of whose forwards make a call over some channels, and how many come before it."""
        for frame in call.frame.ancestors():
            if frame.name is None:
                continue
            ordinal = self._named(frame, call.name).index(call)
            # none of an entry of a list that did not run
            if all(self._reads(other, call.name, ordinal, dim, run) for other in self._frames.get(frame.name, ())):
                return frame, ordinal
        return None

    def _reads(self, frame: Frame, name: str, ordinal: int, dim: int, run: Run) -> bool:
        calls = self._named(frame, name)
        return ordinal < len(calls) and run in set(runs(self._f.axes(calls[ordinal].inputs[0])[dim]))

    def _named(self, frame: Frame, name: str) -> list[Call]:
        if (frame, name) not in self._calls:
            made = [call for call in frame.calls() if call.name == name and call.outputs]
            self._calls[frame, name] = made
        return self._calls[frame, name]
