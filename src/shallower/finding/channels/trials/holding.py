"""Numbers that modules hold in attributes and that have to fall with channels: found by trying.

Every site that some size does not follow proposes a number of the modules around the call, all sites at once; one pass
shows which of them put sizes right. Repeated blocks propose the same, so there are as many passes as a block has
numbers that come into question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor

from shallower.finding.channels.layout import Run, runs, spans
from shallower.finding.channels.trials.leading import Led
from shallower.modules.prepared.weight_norms import place_of_weight
from shallower.modules.written import leaves
from shallower.recording.tracing import Call, Value
from shallower.sites import Follower, Site
from shallower.sites.slots import positions_each

if TYPE_CHECKING:
    from shallower.finding.channels.trials.trying import ChannelTrial

FOLLOWING_TENSORS = {
    "in_features", "out_features", "in_channels", "out_channels", "num_features", "num_channels", "embedding_dim",
    "num_embeddings", "nx", "nf",
}  # fmt: skip
"""Sizes that layers hold beside their weight and that follow it."""

MOST_FRAMES = 3
"""Modules around a call that may hold its numbers: the one whose forward makes it, and those that call that."""

MOST_ROUNDS = 12

Proposal = tuple[Follower, ...]


class HeldNumbers:
    """Looks for the numbers of sites among what modules hold."""

    def __init__(self, trial: ChannelTrial) -> None:
        self.trial = trial
        self._hopeless: set[object] = set()

    def take(self, left: dict[str, Site], chosen: Sequence[Site], led: Led, *, one: bool) -> bool:
        """Give sites of `left` the numbers that modules hold and that put sizes right; whether there are any.

        Args:
            left: sites by name; changed.
            chosen: those that were cut in the pass.
            led: the pass.
            one: whether they lost a few channels, and not a share.
        """
        names = list(map(attrgetter("name"), chosen))
        took = False
        for _ in range(MOST_ROUNDS):
            proposed = self._proposed(left, chosen, led)
            if not proposed:
                break
            if led.ended is not None:  # of several it would not show with which the pass goes further
                name = next(iter(proposed))
                proposed = {name: proposed[name]}
            tried = dict(left)
            for name, proposal in proposed.items():
                tried[name] = replace(left[name], followers=(*left[name].followers, *proposal))
            after = self.trial.led(list(map(tried.__getitem__, names)), one=one)
            better = 0
            for name, proposal in proposed.items():
                better_alone = partial(self._is_right_alone, left[name], tried[name], one=one)
                if self._is_better(led, after, name, proposal, better_alone):
                    better += 1
                    left[name] = tried[name]
                else:
                    self._hopeless.add(self._kind(left[name], proposal))
            took = took or better > 0
            if better == len(proposed):
                led = after
            elif better:
                led = self.trial.led(list(map(left.__getitem__, names)), one=one)
        return took

    # ------------------------------------------------------------------------------------------------- proposals

    def _proposed(self, left: Mapping[str, Site], chosen: Sequence[Site], led: Led) -> dict[str, Proposal]:
        """The next numbers that come into question for each site; no number for two sites at once."""
        proposed: dict[str, Proposal] = {}
        taken: set[tuple[str, str]] = set()
        for site in chosen:
            for proposal in self._choices(left[site.name], led):
                own = set(map(attrgetter("place"), proposal))
                if own & taken or self._kind(left[site.name], proposal) in self._hopeless:
                    continue
                taken |= own
                proposed[site.name] = proposal
                break
        return proposed

    def _choices(self, site: Site, led: Led) -> Iterator[Proposal]:
        """Numbers that modules around calls hold and that these were given: one at a time, then those of a module."""
        held = set(map(attrgetter("place"), site.followers))
        together: dict[str, dict[str, Follower]] = {}
        for call, numbers in self._wanting(site, led):
            for frame in list(call.frame.ancestors())[:MOST_FRAMES]:
                if frame.name is None:
                    continue
                module = self.trial.model.get_submodule(frame.name)
                weighty = isinstance(getattr(*place_of_weight(module), None), Tensor)
                for attribute, value in vars(module).items():
                    own = type(value) is int and not (weighty and attribute in FOLLOWING_TENSORS)
                    if own and value in numbers and (frame.name, attribute) not in held:
                        follower = Follower(frame.name, attribute, numbers[value])
                        together.setdefault(frame.name, {})[attribute] = follower
                        yield (follower,)
        for several in together.values():
            if len(several) > 1:
                yield tuple(several.values())

    def _wanting(self, site: Site, led: Led) -> Iterator[tuple[Call, dict[int, int]]]:
        """The calls at which something does not follow a site, and the numbers by how much they would have to fall.

        First the sizes as they are, then the factors that a forward may have made them of.
        """
        run, width = self.trial.found[site.name], site.width
        factors: list[tuple[Call, dict[int, int]]] = []
        others = self.trial.blamed_calls(led)
        for wrong in led.wrong.values():
            call = self.trial.f.trace.calls[wrong.at]
            if run in runs(wrong.size.layout):
                given = abs(int(wrong.size.given))
                each = positions_each(spans(wrong.size.layout, run))
                yield call, {given: each}
                factors.append((call, _factors(given, width)))
        for call in dict.fromkeys(others):
            if site.name in self.trial.met(call, [site]):
                for number in leaves(call.args, call.kwargs):
                    if type(number) is int and number >= width and number % width == 0:
                        yield call, {number: number // width}
                        factors.append((call, _factors(number, width)))
        if led.ended is not None:
            for call in self.trial.f.trace.calls[led.ended : led.ended + 1]:
                yield call, self._sizes_before(call, run)
        yield from factors

    def _sizes_before(self, call: Call, run: Run) -> dict[int, int]:
        """The sizes that count the channels in what a call reads or the modules around it: a forward may check them."""
        found: dict[int, int] = {}
        read: list[object] = [*call.inputs]
        for frame in list(call.frame.ancestors())[:MOST_FRAMES]:
            read += leaves(frame.args, frame.kwargs)
        for value in read:
            if not isinstance(value, Value):
                continue
            for axis in self.trial.f.axes(value):
                if run in runs(axis):
                    found[axis.size] = positions_each(spans(axis, run))
        return found

    # ------------------------------------------------------------------------------------------------- judgement

    def _is_better(
        self, before: Led, after: Led, name: str, proposal: Proposal, is_right_alone: Callable[[], bool]
    ) -> bool:
        """Whether numbers put something of a site right, and nothing wrong in the modules that hold them."""
        own_before, own_after = self._entries(before, name), self._entries(after, name)
        until = before.ended if before.ended is not None else 1 << 60
        further = after.ended is None or after.ended > until
        if after.ended is not None and after.ended < until:
            return False
        new = {entry for entry in after.entries - before.entries if entry[0] < until}
        near = {entry for entry in new if entry in own_after or self._lies_in(entry[0], proposal)}
        better = own_before - own_after
        # what the number disturbs in turn can be written where it puts as much right: other branches may read it
        if near and (len(near) > len(better) or not near <= after.wrong.keys()):
            return False
        return bool(better) or (before.ended is not None and further and is_right_alone())

    def _is_right_alone(self, before: Site, after: Site, *, one: bool) -> bool:
        """Whether numbers put nothing wrong where no other site is cut, whose size they may happen to be."""
        first, second = self.trial.led([before], one=one), self.trial.led([after], one=one)
        until = first.ended if first.ended is not None else 1 << 60
        if second.ended is not None and second.ended < until:
            return False
        return all(at >= until for at, _ in second.entries - first.entries)

    def _entries(self, led: Led, name: str) -> set[tuple[int, int]]:
        """What is wrong in a pass at calls that read or give the channels of a site."""
        calls, run = self.trial.f.trace.calls, self.trial.found[name]
        found: set[tuple[int, int]] = set()
        for at, place in led.entries:
            wrong = led.wrong.get((at, place))
            if wrong is not None:
                if run in runs(wrong.size.layout):
                    found.add((at, place))
            elif self.trial.holds(calls[at], run):
                found.add((at, place))
        return found

    def _lies_in(self, at: int, proposal: Proposal) -> bool:
        """Whether a call is made in a module that holds one of the numbers, or below it."""
        holders = {follower.module for follower in proposal}
        return any(frame.name in holders for frame in self.trial.f.trace.calls[at].frame.ancestors())

    def _kind(self, site: Site, proposal: Proposal) -> object:
        """What is alike in the proposals of repeated blocks."""
        holders = []
        for follower in proposal:
            holder = type(self.trial.model.get_submodule(follower.module))
            holders.append((holder, follower.module.count("."), follower.attribute, follower.each))
        return kind_of_site(site), tuple(holders)


def _factors(number: int, width: int) -> dict[int, int]:
    """The multiples of a width that a number is a multiple of, each with how often the width goes into it."""
    return {v: v // width for v in range(width, number, width) if number % v == 0}


def kind_of_site(site: Site) -> tuple[object, ...]:
    """What is alike in sites of repeated blocks."""
    return (site.kind, site.width, tuple((s.attribute, s.shape, s.axis, s.spans) for s in site.slots))
