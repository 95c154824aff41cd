"""Loops over channels: calls that are made for one position of an axis, or for one entry of a list of modules.

for i, expert in enumerate(self.experts):           # calls on the rows of position i of the router
    rows = torch.where(chosen == i)[0]
    y.index_add_(0, rows, expert(x[rows]))

Where position i and entry i meet, again and again, the entries of the list go with the positions: fewer channels are
fewer entries, and fewer turns of the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from shallower.finding.channels.layout import Layout, Run, close, is_open, resolved, runs, tie
from shallower.recording.tracing import Call, Frame, Trace, Value

if TYPE_CHECKING:
    from shallower.finding.channels.following import Following

Turn = tuple[Layout, int]

ADDING = {"add", "index_add", "index_put", "index_copy", "scatter_add", "setitem"}
"""Functions that add what one turn gives to what the earlier ones gave."""

BY_NUMBER = "takes positions of it by number"


class Turns:
    """The turns of loops in a pass.

    Attributes:
        lists: lists of modules that run beside each other, each with a run of its entries.
        of_value: what was made for one position only.
        of_call: the calls that are made for one position, which are missing where that has gone.
        picked: axes of which positions were taken by number, and by which calls.
    """

    def __init__(self, trace: Trace) -> None:
        self.lists: dict[str, Run] = {}
        self.of_value: dict[Value, list[Turn]] = {}
        self.of_call: dict[Call, list[Turn]] = {}
        self.picked: list[tuple[Layout, Call]] = []
        self._own: dict[Call, Turn] = {}
        self._loops = set(_loops(trace))
        self._entries: dict[Frame, Turn] = {}
        for name, frames in _parallel_lists(trace).items():
            self.lists[name] = Run(frames[0][1])
            for frame, _, i in frames:
                self._entries[frame] = self.lists[name], i

    def pick(self, call: Call, layout: Layout, index: int) -> bool:
        """Note that a call takes one position of an axis, where it is one of many that do; else False."""
        if call not in self._loops or not is_open(layout):
            return False
        self.own(call, layout, index)
        self.picked.append((layout, call))
        return True

    def own(self, call: Call, layout: Layout, index: int) -> None:
        """A call is made for a position of an axis."""
        self._own[call] = layout, index % layout.size

    def at(self, call: Call) -> dict[Run, set[int]]:
        """For which positions of which axes a call is made, or reads what was made."""
        given: list[Turn] = []
        for value in call.inputs:
            given += self.of_value.get(value, ())
        if call in self._own:
            given.append(self._own[call])
        for frame in call.frame.ancestors():
            if frame in self._entries:
                given.append(self._entries[frame])
                break
        found: dict[Run, set[int]] = {}
        for layout, i in given:
            run = resolved(layout)
            if isinstance(run, Run):
                found.setdefault(run, set()).add(i)
            else:
                close(run, "it is divided, and its positions are taken one by one")
        return found

    def stacked(self, values: Iterable[Value]) -> Layout | None:
        """The axis whose positions some values are, one after the other, from the first to the last."""
        given = list(values)
        for run, _ in _by_run(self.of_value.get(given[0], ())):
            if [self.place(value, run) for value in given] == list(range(run.size)):
                return run
        return None

    def place(self, value: Value, run: Run) -> int | None:
        """For which position of a run a value was made; None where it is for none of them."""
        for known, i in _by_run(self.of_value.get(value, ())):
            if known is run:
                return i
        return None

    def lists_of(self, run: Run) -> tuple[str, ...] | None:
        """The lists whose entries a run's channels are; None where they are only a part of one."""
        found: list[str] = []
        for name, entries in self.lists.items():
            if resolved(entries) is run:
                found.append(name)
            elif run in set(runs(entries)):
                return None
        return tuple(found)

    def is_made(self, call: Call, fewer: Mapping[Run, int]) -> bool:
        """Whether a call is still made where of some runs only the first channels are left."""
        return all(i < fewer.get(run, run.size) for run, i in _by_run(self.of_call.get(call, ())))


def carry_turns(f: Following, call: Call) -> None:
    """Say for which turn of a loop a call is made; channels and list entries of one turn go together."""
    turns = f.turns
    _tie_met(turns.at(call))
    made: list[Turn] = []
    own: list[Turn] = []
    for run, positions in turns.at(call).items():
        adds = _adds(turns, call, run)
        if len(positions) > 1 and call.name == "stack":
            continue
        if len(positions) > 1 and not adds:
            close(run, f"{f.title(call)} reads several of its positions")
            continue
        own.append((run, max(positions)))
        if not adds:
            made.append((run, max(positions)))
    if own:
        turns.of_call[call] = own
    if made:
        for value in call.outputs:
            turns.of_value.setdefault(value, []).extend(made)


def close_picked(f: Following) -> None:
    """Axes of which positions are taken by number stay, but for those among which something is chosen."""
    for layout, call in f.turns.picked:
        for run in runs(layout):
            if "chosen" not in run.marks:
                close(layout, f"{f.title(call)} {BY_NUMBER}")
        f.contracted.append((layout, call))


def _tie_met(found: Mapping[Run, set[int]]) -> None:
    """The first run of several of one size that meet at the same position, with the others."""
    waiting = list(found)
    while waiting:
        first = waiting.pop()
        for other in waiting:
            if first.size == other.size and found[first] == found[other]:
                tie(other, first)
                break


def _adds(turns: Turns, call: Call, run: Run) -> bool:
    """Whether a call adds what a turn gives to a value that is no turn's, or another's."""
    if call.name not in ADDING or not call.outputs:
        return False
    positions: set[int] = set()
    free = False
    for value in call.inputs:
        place = turns.place(value, run)
        if place is not None:
            positions.add(place)
        elif value.shape == call.outputs[0].shape:
            free = True
    return free or len(positions) > 1


def _by_run(given: Iterable[Turn]) -> Iterator[tuple[Run, int]]:
    for layout, i in given:
        run = resolved(layout)
        if isinstance(run, Run):
            yield run, i


def _loops(trace: Trace) -> Iterator[Call]:
    """The calls that take positions of an axis one by one, others than the first and the last."""
    picks: dict[tuple[Value, int], dict[Call, int]] = {}
    for call in trace.calls:
        if call.name in ("getitem", "select") and call.inputs and call.args[0] is call.inputs[0]:
            place = _position_taken(call)
            if place is not None and place[0] < len(call.inputs[0].shape):
                size = call.inputs[0].shape[place[0]]
                picks.setdefault((call.inputs[0], place[0]), {})[call] = place[1] % max(size, 1)
    for (value, dim), own in picks.items():
        taken = set(own.values())
        if len(taken) > 1 and (value.shape[dim] == 2 or taken - {0, value.shape[dim] - 1}):
            yield from own


def _position_taken(call: Call) -> tuple[int, int] | None:
    """Which axis a call takes a position of, and which; None where it takes none, or more."""
    if call.name == "select":
        named = dict(zip(("input", "dim", "index"), call.args, strict=False)) | dict(call.kwargs)
        dim, index = named.get("dim"), named.get("index")
        if type(dim) is not int or type(index) is not int:
            return None
        return dim % len(call.inputs[0].shape), index
    items = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    found: tuple[int, int] | None = None
    dim = 0
    for at, item in enumerate(items):
        if item is Ellipsis:
            rest = items[at + 1 :]
            dim = len(call.inputs[0].shape) - len(rest) + rest.count(None)
        elif type(item) is int:
            if found is not None:
                return None
            found = dim, item
            dim += 1
        elif isinstance(item, slice):
            dim += 1
        elif item is not None:
            return None
    return found


def _parallel_lists(trace: Trace) -> dict[str, list[tuple[Frame, int, int]]]:
    """Lists of like modules, none of which reads what another gives: frames, of how many entries, and which it is."""
    frames: dict[nn.Module, list[Frame]] = {}
    for frame in trace.frames:
        frames.setdefault(frame.module, []).append(frame)
    found: dict[str, list[tuple[Frame, int, int]]] = {}
    for name, holder in trace.model.named_modules():
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            continue
        entries = list(holder.children())
        ran: list[Frame] = []
        for entry in entries:
            ran += frames.get(entry, [])[:1]
        alike = len({type(entry) for entry in entries}) == 1 and len(entries) == len(holder)
        if alike and len(ran) > 1 and not _reads(trace, *sorted(ran[:2], key=trace.frames.index)):
            found[name] = []
            for i, entry in enumerate(entries):
                found[name] += [(frame, len(entries), i) for frame in frames.get(entry, ())]
    return found


def _reads(trace: Trace, first: Frame, second: Frame) -> bool:
    """Whether one frame reads what was made of what another gave."""
    made = set(first.outputs)
    inside = set(second.calls())
    for call in trace.calls:
        if not made.isdisjoint(call.inputs):
            if call in inside:
                return True
            made.update(call.outputs)
    return False
