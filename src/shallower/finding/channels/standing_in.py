"""Experts to which no token went: followed as if they had run in the place of one beside them that did.

    follow_unrun(followed)              # weights of a list's other entries are read, too, from now on

Entries of a `nn.ModuleList` or `nn.ModuleDict` that are built alike do the same with what they are given. Where those
that ran read the same channels and write the same, one that did not run would have done so as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._pytree import tree_map

from shallower.finding.channels.layout import Run, is_open, runs, tie
from shallower.recording.tracing import Call, Frame, Trace, Value
from shallower.sites import Follower, Site

if TYPE_CHECKING:
    from shallower.finding.channels.following import Following

SAYS_THE_SAME = (int, float, bool, str, type(None))


def follow_unrun(f: Following) -> None:
    """Follow the calls that entries of lists would have made that did not run."""
    names = f.trace.names
    frames: dict[nn.Module, list[Frame]] = {}
    for frame in f.trace.frames:
        frames.setdefault(frame.module, []).append(frame)
    for holder in f.trace.model.modules():
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            continue
        for entry, ran in _to_follow(f, holder, frames):
            _stand_in(f, names, entry, frames[ran[0]][0])


def _to_follow(
    f: Following, holder: nn.Module, frames: Mapping[nn.Module, list[Frame]]
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The entries of a list that did not run, each with those like it that did."""
    alike: dict[object, list[nn.Module]] = {}
    for entry in holder.children():
        if next(entry.parameters(), None) is not None:
            alike.setdefault(_built_as(entry), []).append(entry)
    for entries in alike.values():
        ran = list(filter(frames.__contains__, entries))
        if not ran or len(ran) == len(entries) or not _are_parallel(f, frames, ran):
            continue
        for entry in entries:
            if frames.keys().isdisjoint(entry.modules()):
                yield entry, ran


def _built_as(module: nn.Module) -> tuple[object, ...]:
    """What two modules have in common that do the same with what they are given, but for their weights."""
    own: list[object] = [type(module)]
    for name, value in sorted(vars(module).items()):
        if isinstance(value, SAYS_THE_SAME):
            own.append((name, value))
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            own += [name, None if tensor is None else tuple(tensor.shape)]
    for name, child in module.named_children():
        own += [name, _built_as(child)]
    return tuple(own)


def _are_parallel(f: Following, frames: Mapping[nn.Module, list[Frame]], ran: list[nn.Module]) -> bool:
    """Whether entries that ran read the same channels and write the same: several do, or one that it reads itself."""
    read: set[tuple[Run, ...]] = set()
    made: set[tuple[Run, ...]] = set()
    for entry in ran:
        frame = frames[entry][0]
        read.add(_open_runs(f, (*frame.args, *frame.kwargs.values())))
        made.add(_open_runs(f, frame.outputs))
    if len(ran) == 1:
        return read == made
    return len(read) == len(made) == 1


def _open_runs(f: Following, items: Iterable[object]) -> tuple[Run, ...]:
    """The open channels of some values, in order."""
    found: list[Run] = []
    for item in items:
        if isinstance(item, Value):
            for axis in filter(is_open, f.axes(item)):
                found += runs(axis)
    return tuple(found)


def _stand_in(f: Following, names: Mapping[nn.Module, str], entry: nn.Module, frame: Frame) -> None:
    """Follow the calls of a frame once more, made by another module with its own weights."""
    others = dict(zip(frame.module.modules(), entry.modules(), strict=True))
    copies = _Copies(f.trace, others, names)
    made = copies.frame(frame, frame.parent)
    for call in copies.calls:
        f.follow(call)
    for value, copied in zip(frame.outputs, made.outputs, strict=True):
        for axis, other in zip(f.axes(value), f.axes(copied), strict=True):
            tie(axis, other)
    f.stand_ins.update(copies.originals)
    f.twins[names[entry]] = names[frame.module]


class _Copies:
    """Copies of frames, calls and values for other modules.

    Attributes:
        calls: in order.
        originals: of each call, the one that was recorded.
    """

    def __init__(self, trace: Trace, others: Mapping[nn.Module, nn.Module], names: Mapping[nn.Module, str]) -> None:
        self.names = names
        self.others = others
        self.calls: list[Call] = []
        self.originals: dict[Call, Call] = {}
        self.values: dict[Value, Value] = {}
        for held in (trace.weights, trace.buffers):
            for (module, attribute), value in held.items():
                if module in others:
                    self.values[value] = held[others[module], attribute]

    def value(self, item: Any) -> Any:
        """The other one of a value, or what is no value as it is."""
        return self.values.get(item, item) if isinstance(item, Value) else item

    def frame(self, frame: Frame, parent: Frame | None) -> Frame:
        """A frame and all that is in it."""
        module = self.others.get(frame.module, frame.module)
        made = replace(frame, module=module, name=self.names.get(module), parent=parent, steps=[])
        for step in frame.steps:
            if isinstance(step, Frame):
                made.steps.append(self.frame(step, made))
            else:
                made.steps.append(self.call(step, made))
        made.args, made.kwargs = tree_map(self.value, (frame.args, dict(frame.kwargs)))
        made.outputs = [self.value(value) for value in frame.outputs]
        return made

    def call(self, call: Call, frame: Frame) -> Call:
        """A call, with values of its own for what it makes."""
        args, kwargs = tree_map(self.value, (call.args, dict(call.kwargs)))
        inputs = [self.value(value) for value in call.inputs]
        made = replace(call, args=args, kwargs=kwargs, inputs=inputs, outputs=[], frame=frame)
        for value in call.outputs:
            copied = replace(value, call=made, readers=[], output=False)
            self.values[value] = copied
            made.outputs.append(copied)
        for value, original in zip(inputs, call.inputs, strict=True):
            if value is not original:
                value.readers.append(made)
        self.calls.append(made)
        self.originals[made] = call
        return made


def like_twins(
    f: Following, known: Iterable[Site], kept: list[Site], skipped: dict[str, str]
) -> tuple[list[Site], dict[str, str]]:
    """Sites of entries that did not run get the numbers of those in whose place they were followed.

    Args:
        f: the followed pass.
        known: sites that were found otherwise.
        kept: sites that can be cut.
        skipped: why others cannot; more are added.
    """
    narrowed = {made.name for site in known for made in (site.producer, site.gate) if made is not None}
    holders: dict[tuple[object, ...], Site] = {}
    for site in kept:
        for slot in site.slots:
            holders[slot.tensor, slot.axis, slot.spans] = site
    found: list[Site] = []
    for site in kept:
        name = _twin_around(f, site)
        if name is None:
            found.append(site)
            continue
        twin = f.twins[name]
        rows = next(slot for slot in site.slots if slot.side)
        tensor = twin + rows.tensor.removeprefix(name)
        other = holders.get((tensor, rows.axis, rows.spans))
        if other is None and tensor.removesuffix(".weight") not in narrowed:
            skipped[site.name] = f"`{twin}`, which is built alike, cannot be cut there"
            continue
        followers: list[Follower] = []
        for each in other.followers if other is not None else ():
            if f"{each.module}.".startswith(f"{twin}."):
                followers.append(replace(each, module=name + each.module.removeprefix(twin)))
        found.append(replace(site, followers=(*site.followers, *followers)))
    return found, skipped


def _twin_around(f: Following, site: Site) -> str | None:
    """The entry that did not run in which a whole site lies."""
    for name in f.twins:
        if all(slot.tensor.startswith(f"{name}.") for slot in site.slots):
            return name
    return None
