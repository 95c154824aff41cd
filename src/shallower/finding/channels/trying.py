"""Do the forwards of a model follow when channels are cut: tried on a copy without data, and the numbers that have to.

A forward may hold numbers of its own (how many heads, where to split). A trial cuts every site in half and runs the
model on the meta device. Every tensor of the pass must have the shape that its layouts say. Where the first has not,
the whole numbers that the call was given are looked for in the modules around it, and fall with the channels in the
next trial; sites for which there are none are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shallower.core.failures import is_out_of_memory
from shallower.core.inputs import Inputs
from shallower.errors import ShallowerError
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, divide, runs, size_of
from shallower.finding.channels.spaces import Found
from shallower.modules.attachment import copied
from shallower.modules.edits import Attribute, Sized, StructuralEdit, perform
from shallower.modules.lists import Entries
from shallower.modules.offloading import weightless
from shallower.modules.preparing import ready_for_cuts
from shallower.recording.tracing import Call, StoppedError, Trace, trace_forward
from shallower.sites import Follower, Site

SIZED = {
    "view", "reshape", "unflatten", "expand", "broadcast_to", "repeat", "tile", "split", "split_with_sizes",
    "tensor_split", "unsafe_split", "getitem", "setitem", "narrow", "zeros", "ones", "empty", "rand", "randn",
    "new_zeros", "new_ones", "new_empty", "layer_norm", "rms_norm", "pad", "multi_head_attention_forward", "slice",
    "as_strided", "constant_pad_nd", "histc", "bincount", "one_hot",
}  # fmt: skip
"""Functions to which forwards give sizes as whole numbers. To others they give numbers to compute with."""

GROUPED = {"group_norm": 1, "conv1d": 6, "conv2d": 6, "conv3d": 6, "channel_shuffle": 1}
"""Functions that divide axis 1 into a number of groups, and where among their arguments that stands."""

FOLLOWING_TENSORS = {
    "in_features", "out_features", "in_channels", "out_channels", "num_features", "num_channels", "embedding_dim",
    "num_embeddings", "nx", "nf",
}  # fmt: skip
"""Sizes that layers hold beside their tensors and that follow these."""

MOST_TRIALS = 100

MOST_FRAMES = 3
"""Modules around a call that may hold its numbers: the one whose forward makes it, and those that call that."""

DOES_NOT_FOLLOW = "the forward does not follow fewer channels"


def that_follow(
    model: nn.Module, inputs: Inputs, f: Following, found: Sequence[Found]
) -> tuple[list[Site], dict[str, str]]:
    """The sites that can be cut, with the numbers that fall with them, and why the others cannot.

    Args:
        model: not changed.
        inputs: what it is called with.
        f: the followed pass.
        found: its spaces.
    """
    trial = _Trial(model, inputs, f, {each.site.name: each.run for each in found})
    settled = trial.settled([each.site for each in found])
    kept: list[Site] = []
    skipped: dict[str, str] = {}
    for each in found:
        if each.site.name in settled:
            kept.append(settled[each.site.name])
        else:
            skipped[each.site.name] = trial.why.get(each.site.name, DOES_NOT_FOLLOW)
    return kept, skipped


class _Trial:
    """Cuts sites of copies of a model, and looks where the pass differs from what the layouts say.

    Attributes:
        why: the reasons of the sites that were left out.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, f: Following, found: Mapping[str, Run]) -> None:
        self.model = model
        self.inputs = inputs
        self.f = f
        self.found = found
        self.why: dict[str, str] = {}
        self._with_data: bool | None = None
        self._trials = 0
        self._hopeless: set[object] = set()

    def settled(self, sites: Sequence[Site]) -> dict[str, Site]:
        """Those of some sites that can be cut together, by name, with the numbers that have to fall."""
        left = {site.name: site for site in sites}
        while left and self._trials < MOST_TRIALS:
            at = self._difference(list(left.values()))
            if at is None:
                return self._one_by_one(left)
            if self._with_data is None:
                # a forward that looks at numbers does not run without them, even with nothing cut
                self._with_data = self._difference([]) is not None
                if self._with_data:
                    continue
            met = self._met(at, left)
            if not met:
                return self._halves(list(left.values()))
            before = dict(left)
            for name in met:
                self._settle_alone(left, name, at)
            if left == before:
                self._leave_out(left, met[0], at)
        for name in left:
            self.why[name] = f"it was not tried alone: the search was given up after {MOST_TRIALS} trials"
        return {}

    def _one_by_one(self, left: dict[str, Site]) -> dict[str, Site]:
        """Those that can be cut without the others, too: every second site loses a few channels, then the others do.

        Where a forward divides one width by another, both cut in half go unnoticed.
        """
        names = list(left)
        for chosen in (names[::2], names[1::2]):
            while chosen:
                at = self._difference([left[name] for name in chosen], one=True)
                if at is None:
                    break
                met = [name for name in self._met(at, left) if name in chosen] or chosen[:1]
                for name in met:
                    self._leave_out(left, name, min(at, len(self.f.trace.calls) - 1))
                    chosen.remove(name)
        return left

    def _settle_alone(self, left: dict[str, Site], name: str, at: int) -> None:
        """Find the numbers that have to fall with one site, for all that are alike; leave it out where none do."""
        site, new = left[name], self._numbers(left[name])
        if new is None:
            self._leave_out(left, name, at)
            return
        for other in list(left.values()):
            left[other.name] = replace(other, followers=(*other.followers, *self._alike(site, other, new)))

    def _leave_out(self, left: dict[str, Site], name: str, at: int) -> None:
        self.why[name] = f"{DOES_NOT_FOLLOW} at {self.f.title(self.f.trace.calls[at])}"
        del left[name]

    def _halves(self, sites: list[Site]) -> dict[str, Site]:
        """The same where it does not show which site is to blame."""
        if len(sites) < 2:
            return {}
        half = len(sites) // 2
        return {**self.settled(sites[:half]), **self.settled(sites[half:])}

    def _met(self, at: int, left: Mapping[str, Site]) -> list[str]:
        """The sites whose channels a call reads or gives."""
        if at >= len(self.f.trace.calls):
            return []
        on_the_way = set(_runs_of(self.f, self.f.trace.calls[at]))
        return [name for name in left if self.found[name] in on_the_way]

    # ------------------------------------------------------------------------------------------------- numbers

    def _numbers(self, site: Site) -> list[Follower] | None:
        """The numbers that have to fall with a site; None where none let the pass come to its end."""
        kind = (_shape(site), type(self.model.get_submodule(site.slots[0].module.rpartition(".")[0])))
        if kind in self._hopeless:
            return None
        found: list[Follower] = []
        at = self._difference([site])
        while at is not None and at < len(self.f.trace.calls):
            step = self._step(replace(site, followers=(*site.followers, *found)), at)
            if step is None:
                self._hopeless.add(kind)
                return None
            more, at = step
            found += more
        return found

    def _step(self, site: Site, at: int) -> tuple[list[Follower], int | None] | None:
        """Numbers with which the pass comes further than a call, and how far; None where there are none."""
        for new in self._choices(site, at):
            if self._trials > MOST_TRIALS:
                return None
            further = self._difference([replace(site, followers=(*site.followers, *new))])
            if further is None or further > at:
                return new, further
        return None

    def _choices(self, site: Site, at: int) -> Iterator[list[Follower]]:
        """Numbers that modules around a call hold and that it was given: one at a time, then those of a module."""
        held = {(follower.module, follower.attribute) for follower in site.followers}
        for module, numbers in _numbers_at(self.f.trace.calls[at], site.width):
            new: list[Follower] = []
            for attribute, value in vars(self.model.get_submodule(module)).items():
                own = type(value) is int and attribute not in FOLLOWING_TENSORS
                if own and value in numbers and (module, attribute) not in held:
                    new.append(Follower(module, attribute, value // site.width))
            yield from ([each] for each in new)
            if len(new) > 1:
                yield new

    def _alike(self, site: Site, other: Site, new: Sequence[Follower]) -> Iterator[Follower]:
        """The same numbers of another site that is like this one, in the modules at the same places around it."""
        if other.name == site.name:
            yield from new
            return
        if _shape(site) != _shape(other):
            return
        own, theirs = site.slots[0].module.split("."), other.slots[0].module.split(".")
        for follower in new:
            parts = follower.module.split(".")
            if own[: len(parts)] != parts:
                continue
            module = ".".join(theirs[: len(parts)])
            same = type(self.model.get_submodule(module)) is type(self.model.get_submodule(follower.module))
            if module != follower.module and same:
                yield replace(follower, module=module)

    # ------------------------------------------------------------------------------------------------- passes

    def _difference(self, sites: Sequence[Site], *, one: bool = False) -> int | None:
        """The first call of a pass with these sites cut that is not what the layouts say; None where all are.

        Each is cut in half, or loses a few channels.

        Numbers that are computed with must be the same, too: a scale of 1 / sqrt(width) would not be.
        """
        self._trials += 1
        kept = {site.name: few_less(site) if one else half_of(site) for site in sites}
        trace, whole = self._passed(sites, kept)
        fewer = {self.found[site.name]: kept[site.name] for site in sites}
        made = [i for i, call in enumerate(self.f.trace.calls) if self.f.turns.is_made(call, fewer)]
        for i, after in zip(made, trace.calls, strict=False):
            before = self.f.trace.calls[i]
            if before.name != after.name or _scalars(before) != _scalars(after):
                return i
            if _groups_of(after) != self._groups(before, fewer):
                return i
            for value, now in zip(before.outputs, after.outputs, strict=False):
                if now.shape != tuple(size_of(axis, fewer) for axis in self.f.axes(value)):
                    return i
        if whole and len(trace.calls) == len(made):
            return None
        return made[len(trace.calls)] if len(trace.calls) < len(made) else len(self.f.trace.calls)

    def _groups(self, call: Call, fewer: Mapping[Run, int]) -> int | None:
        """Into how many groups a call has to divide its channels when some runs have fewer."""
        groups = _groups_of(call)
        if groups is None or groups == 1:
            return groups
        channels = self.f.axes(call.inputs[0])[1]
        return size_of(divide(channels, groups, channels.size // groups)[0], fewer)

    def _passed(self, sites: Sequence[Site], kept: Mapping[str, int]) -> tuple[Trace, bool]:
        """A pass of a copy with these sites cut, as far as it goes, and whether it goes to the end."""
        memo = {} if self._with_data else weightless(self.model.parameters())
        trial = copied(self.model, memo)
        try:
            for edit in _shortened(trial, sites, kept):
                perform(trial, edit)
                if self._with_data and isinstance(edit, Sized):
                    getattr(trial.get_submodule(edit.name), edit.attribute).detach().zero_()
            return trace_forward(trial, self.inputs), True
        except StoppedError as stopped:
            if stopped.__cause__ is not None and is_out_of_memory(stopped.__cause__):
                raise
            return stopped.trace, False
        except (ShallowerError, RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            return Trace(trial, self.f.trace.root), False


def _runs_of(f: Following, call: Call) -> Iterator[Run]:
    for value in (*call.inputs, *call.outputs):
        for axis in f.axes(value):
            yield from runs(axis)


def _numbers_at(call: Call, width: int) -> Iterator[tuple[str, set[int]]]:
    """The whole numbers that a call was given and that divide by the channels, for the modules around it.

    First as they are, then the factors that a forward may have made them of.
    """
    given = {n for n in _whole_numbers((call.args, call.kwargs)) if n >= width and n % width == 0}
    if not given:
        return
    factors = {v for n in given for v in range(width, n + 1, width) if n % v == 0} - given
    near = list(call.frame.ancestors())[:MOST_FRAMES]
    for numbers in (given, factors):
        for frame in near:
            if frame.name is not None:
                yield frame.name, numbers


def _whole_numbers(given: object) -> Iterator[int]:
    if type(given) is int:
        yield given
    elif isinstance(given, Mapping):
        yield from _whole_numbers(tuple(given.values()))
    elif isinstance(given, (tuple, list)):
        for item in given:
            yield from _whole_numbers(item)
    elif isinstance(given, slice):
        yield from _whole_numbers((given.start, given.stop))


def _scalars(call: Call) -> list[float]:
    """The numbers that a call computes with: not sizes, and not how many groups there are."""
    found: list[float] = []
    at = GROUPED.get(call.name, len(call.args))
    named = {name: item for name, item in call.kwargs.items() if name not in ("groups", "num_groups")}
    for item in tree_leaves((call.args[:at], call.args[at + 1 :], named)):
        if type(item) is float or (type(item) is int and call.name not in SIZED):
            found.append(item)
    return found


def _groups_of(call: Call) -> int | None:
    """Into how many groups a call divides its channels."""
    at = GROUPED.get(call.name)
    if at is None:
        return None
    groups = call.kwargs.get("num_groups", call.kwargs.get("groups", call.args[at] if len(call.args) > at else 1))
    return groups if type(groups) is int else None


def _shape(site: Site) -> tuple[object, ...]:
    """What is alike in sites of repeated blocks."""
    return (site.kind, site.width, tuple((s.attribute, s.shape, s.axis, s.spans) for s in site.slots))


def half_of(site: Site) -> int:
    """How many channels a trial leaves."""
    return max((site.width + 1) // 2, site.least)


def few_less(site: Site) -> int:
    """How many channels a trial leaves that takes few: as few as products by experts take, which count in 16 bytes."""
    lost = 8 if site.width > 16 else 4 if site.width > 4 else 1
    return max(site.width - lost, site.least)


def _shortened(model: nn.Module, sites: Sequence[Site], kept: Mapping[str, int]) -> Iterator[StructuralEdit]:
    """The edits that leave the first channels of each site, without numbers."""
    left: dict[str, dict[int, Tensor]] = {}
    fewer: dict[tuple[str, str], int] = {}
    for site in sites:
        gone = torch.arange(kept[site.name], site.width)
        for f in site.followers:
            fewer[f.module, f.attribute] = fewer.get((f.module, f.attribute), 0) + f.each * len(gone)
        for slot in site.slots:
            axes = left.setdefault(slot.tensor, {})
            staying = axes.setdefault(slot.axis, torch.ones(slot.shape[slot.axis], dtype=torch.bool))
            staying[slot.positions(gone)] = False
    yield from ready_for_cuts(model, left)
    for (module, attribute), count in fewer.items():
        yield Attribute(module, attribute, getattr(model.get_submodule(module), attribute) - count)
    for name, axes in left.items():
        module, _, attribute = name.rpartition(".")
        shape = list(getattr(model.get_submodule(module), attribute).shape)
        for axis, staying in axes.items():
            shape[axis] = int(staying.sum())
        yield Sized(module, attribute, tuple(shape))
    for site in sites:
        for listed in site.lists:
            yield Entries(listed.module, tuple(range(kept[site.name])))
