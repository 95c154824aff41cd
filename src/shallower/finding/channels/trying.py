"""Do the forwards of a model follow when channels are cut: tried on a copy without data, and the numbers that have to.

A forward may hold numbers of its own (how many heads, where to split). A trial cuts every site in half, runs the model
on the meta device and follows the channels again: each site must be there, half as wide. Sites that are not are tried
one by one, with whole numbers of the modules on their way falling with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shallower.core.failures import is_out_of_memory
from shallower.core.inputs import Inputs
from shallower.errors import ShallowerError
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, runs, size_of
from shallower.finding.channels.spaces import Found
from shallower.modules.attachment import copied
from shallower.modules.edits import Attribute, Sized, perform
from shallower.modules.offloading import weightless
from shallower.recording.tracing import Call, Trace, trace_forward
from shallower.sites import Follower, Site

Number = tuple[str, str, int]
"""A whole number that may fall with the channels: module, attribute, by how much for each channel."""

COMPUTING = {"add", "sub", "mul", "div", "pow", "tensor", "full", "masked_fill", "clamp"}
"""Functions whose whole numbers are no sizes."""

MOST_NUMBERS = 3
MOST_TRIALS = 16


def that_follow(
    model: nn.Module, inputs: Inputs, f: Following, found: Sequence[Found]
) -> tuple[list[tuple[int, Site]], dict[str, str]]:
    """The sites that can be cut, with the numbers that fall with them, and why the others cannot.

    Args:
        model: not changed.
        inputs: what it is called with.
        f: the followed pass.
        found: its spaces.
    """
    trial = _Trial(model, inputs, f, {each.site.name: each.run for each in found})
    settled = {site.name: site for site in trial.settled([each.site for each in found])}
    kept = [(each.position, settled[each.site.name]) for each in found if each.site.name in settled]
    reason = "the forward does not follow fewer channels, whatever numbers of the modules around them fall with them"
    return kept, {each.site.name: reason for each in found if each.site.name not in settled}


def _scalars(call: Call) -> list[float]:
    """The numbers that a call computes with: not sizes. A scale of 1 / sqrt(width) changes with the width."""
    found: list[float] = []
    for item in tree_leaves((call.args, dict(call.kwargs))):
        if type(item) is float or (type(item) is int and call.name in COMPUTING):
            found.append(item)
    return found


class _Trial:
    """Cuts sites of copies of a model, and looks whether they are there afterwards."""

    def __init__(self, model: nn.Module, inputs: Inputs, f: Following, found: Mapping[str, Run]) -> None:
        self.model = model
        self.f = f
        self.found = found
        self.inputs = inputs
        self._with_data: bool | None = None
        self._known: dict[tuple[object, ...], tuple[Number, ...] | None] = {}

    def settled(self, sites: Sequence[Site]) -> list[Site]:
        """Those of some sites that can be cut together, with the numbers that have to fall."""
        if not sites:
            return []
        missing = self.missing(sites)
        if not missing:
            return list(sites)
        if len(missing) == len(sites) and self._with_data is None:
            # nothing cut: a forward that looks at numbers does not run without them
            self._with_data = self._passed(()) is None
            return self.settled(sites)
        if len(sites) == 1:
            return self._with_numbers(sites[0])
        if len(missing) < len(sites):
            here = [site for site in sites if site.name not in missing]
            others = [site for site in sites if site.name in missing]
            return self.settled(here) + self.settled(others)
        half = len(sites) // 2
        return self.settled(sites[:half]) + self.settled(sites[half:])

    def _with_numbers(self, site: Site) -> list[Site]:
        """The site with the fewest numbers with which the forward follows; nothing where none are enough."""
        candidates = tuple(_candidates(self.model, self.f, self.found[site.name], site))
        kinds = tuple((type(self.model.get_submodule(m)), a, each) for m, a, each in candidates)
        key = (_shape(site), kinds)
        if key not in self._known:
            self._known[key] = self._numbers(site, candidates)
        chosen = self._known[key]
        if chosen is None:
            return []
        wanted = {(a, each) for _, a, each in chosen}
        more = tuple(Follower(m, a, each) for m, a, each in candidates if (a, each) in wanted)
        return [replace(site, followers=site.followers + more)]

    def _numbers(self, site: Site, candidates: Sequence[Number]) -> tuple[Number, ...] | None:
        """All of them together, or else the fewest."""
        if not candidates:
            return None
        choices = [candidates]
        for size in range(1, min(len(candidates) - 1, MOST_NUMBERS) + 1):
            choices += combinations(candidates, size)
        for chosen in choices[:MOST_TRIALS]:
            followers = tuple(Follower(*each) for each in chosen)
            if not self.missing([replace(site, followers=site.followers + followers)]):
                return tuple(chosen)
        return None

    def missing(self, sites: Sequence[Site]) -> set[str]:
        """The sites that the forward does not follow when all are cut in half; all of them where it does not run.

        Every tensor of the pass must have the shape that its layouts say, and numbers that are computed with must stay.
        """
        trace = self._passed(sites)
        everything = {site.name for site in sites}
        if trace is None or len(trace.calls) != len(self.f.trace.calls):
            return everything
        fewer = {self.found[site.name]: _half(site) for site in sites}
        for before, after in zip(self.f.trace.calls, trace.calls, strict=True):
            if before.name != after.name or _scalars(before) != _scalars(after):
                return everything
            for value, now in zip(before.outputs, after.outputs, strict=False):
                axes = self.f.axes(value)
                if now.shape != tuple(size_of(axis, fewer) for axis in axes):
                    on_the_way = {run for axis in axes for run in runs(axis)}
                    met = {site.name for site in sites if self.found[site.name] in on_the_way}
                    return met or everything
        return set()

    def _passed(self, sites: Sequence[Site]) -> Trace | None:
        """A pass of a copy with these sites cut; None where it fails."""
        memo = {} if self._with_data else weightless(self.model.parameters())
        trial = copied(self.model, memo)
        try:
            for edit in _halved(trial, sites):
                perform(trial, edit)
                if self._with_data and isinstance(edit, Sized):
                    getattr(trial.get_submodule(edit.name), edit.attribute).detach().zero_()
            return trace_forward(trial, self.inputs)
        except (ShallowerError, RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            return None


def _shape(site: Site) -> tuple[object, ...]:
    """What is alike in sites of repeated blocks."""
    return (site.kind, site.width, tuple((s.attribute, s.shape, s.axis, s.spans) for s in site.slots))


def _candidates(model: nn.Module, f: Following, run: Run, site: Site) -> Iterator[Number]:
    """Whole numbers that modules on the way hold and that their forwards give to operations on these channels.

    A number that divides by the channels falls with each by its share: how many heads, all their features.
    """
    held = {(follower.module, follower.attribute) for follower in site.followers}
    for module, numbers in _literals(f, run).items():
        for attribute, value in vars(model.get_submodule(module)).items():
            if type(value) is int and value in numbers and (module, attribute) not in held:
                yield module, attribute, value // site.width


def _literals(f: Following, run: Run) -> dict[str, set[int]]:
    """The whole numbers that forwards give to operations on a run's channels, and that divide by them, by module."""
    found: dict[str, set[int]] = {}
    for call in f.trace.calls:
        numbers = {n for n in _whole_numbers((call.args, call.kwargs)) if n >= run.size and n % run.size == 0}
        if not numbers:
            continue
        axes = [axis for value in (*call.inputs, *call.outputs) for axis in f.axes(value)]
        if not any(run in runs(axis) for axis in axes):
            continue
        for frame in call.frame.ancestors():
            if frame.name is not None:
                found.setdefault(frame.name, set()).update(numbers)
    return found


def _whole_numbers(given: object) -> Iterator[int]:
    if type(given) is int:
        yield given
    elif isinstance(given, Mapping):
        for item in given.values():
            yield from _whole_numbers(item)
    elif isinstance(given, (tuple, list)):
        for item in given:
            yield from _whole_numbers(item)
    elif isinstance(given, slice):
        yield from _whole_numbers((given.start, given.stop))


def _half(site: Site) -> int:
    return (site.width + 1) // 2


def _halved(model: nn.Module, sites: Sequence[Site]) -> Iterator[Attribute | Sized]:
    """The edits that leave the first half of each site's channels, without numbers."""
    left: dict[str, dict[int, Tensor]] = {}
    fewer: dict[tuple[str, str], int] = {}
    for site in sites:
        gone = torch.arange(_half(site), site.width)
        for f in site.followers:
            fewer[f.module, f.attribute] = fewer.get((f.module, f.attribute), 0) + f.each * len(gone)
        for slot in site.slots:
            axes = left.setdefault(slot.tensor, {})
            staying = axes.setdefault(slot.axis, torch.ones(slot.shape[slot.axis], dtype=torch.bool))
            staying[slot.positions(gone)] = False
    for (module, attribute), count in fewer.items():
        yield Attribute(module, attribute, getattr(model.get_submodule(module), attribute) - count)
    for name, axes in left.items():
        module, _, attribute = name.rpartition(".")
        shape = list(getattr(model.get_submodule(module), attribute).shape)
        for axis, staying in axes.items():
            shape[axis] = int(staying.sum())
        yield Sized(module, attribute, tuple(shape))
