"""Sizes that no module holds: written in the calls that are given them, and falling there with the channels.

A size that counts other things than channels, too, becomes whatever the others leave, where its call allows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from shallower.errors import Refusal
from shallower.finding.channels.layout import Cat, Layout, Prod, Run, resolved, runs, spans
from shallower.finding.channels.trials.leading import Wrong
from shallower.modules.written import CallPath, leaves, path_along
from shallower.sites import Follower, Site, Written
from shallower.sites.slots import positions_each

if TYPE_CHECKING:
    from shallower.finding.channels.trials.trying import ChannelTrial

SHAPED = ("view", "reshape", "expand", "broadcast_to")
"""Functions whose last arguments are a shape."""

DEPENDS = "the size depends on the inputs"
TWO = "channels of two kinds are in one number"
OFTEN = "the call is made several times with other numbers"


class WrittenNumbers:
    """Lets calls take numbers of their own.

    Attributes:
        alike: channels that one number counts at several calls: it can fall where they are cut alike.
    """

    def __init__(self, trial: ChannelTrial) -> None:
        self.trial = trial
        self.alike: list[list[Run]] = []

    def write(self, left: dict[str, Site], chosen: Sequence[Site], wrong: Collection[Wrong]) -> Counter[str]:
        """Let calls take numbers of their own, for the sites whose channels these count and those that disturb them.

        Returns the sites whose channels are with those of others in numbers that do not follow, by how often.
        """
        known = dict(left)
        often: list[Wrong] = []
        by_run = {self.trial.found[name]: name for name in left}
        before = {name: site.followers for name, site in left.items()}
        within: Counter[str] = Counter()
        for each in wrong:
            call = self.trial.f.trace.calls[each.at]
            cut = [site.name for site in chosen if site.name in left]
            counted = [by_run[run] for run in dict.fromkeys(runs(each.size.layout)) if by_run.get(run) in left]
            near = [name for name in cut if self.trial.found[name] in self.trial.runs_in(call.frame)]
            made = self._followers(left, each, counted, [[], near, cut], before)
            if isinstance(made, Refusal) and made.reason == TWO:
                within.update(counted)
            elif isinstance(made, Refusal):
                several: list[str] = []
                if made.reason == OFTEN:
                    several = self._writing(left, each)
                    often.append(each)
                for name in several or [name for name in counted if name in cut] or near or cut:
                    self.trial.leave_out(left, name, call, made.reason)
            else:
                for name, follower in made.items():
                    left[name] = replace(left[name], followers=(*left[name].followers, follower))
        if often:
            places = set(map(self._place_of, often))
            self.note_alike(known, [each for each in wrong if self._place_of(each) in places])
        return within

    def note_alike(self, left: Mapping[str, Site], wrong: Sequence[Wrong], alone: Sequence[str] = ()) -> None:
        """Note the channels that one number counts at several calls, those that change it already among them.

        Args:
            left: sites by name.
            wrong: the sizes, by calls.
            alone: sites that were cut with no others, and whose channels a forward counts for those of others.
        """
        by_run = {self.trial.found[name]: name for name in left}
        groups: dict[object, dict[Run, None]] = {}
        for each in wrong:
            place = self._place_of(each)
            if isinstance(place, Refusal):
                continue
            group = groups.setdefault(place, {})
            counted = [run for run in runs(each.size.layout) if run in by_run]
            near = self.trial.runs_in(self.trial.f.trace.calls[each.at].frame)
            counted += [self.trial.found[name] for name in alone if self.trial.found[name] in near]
            for run in [*counted, *map(self.trial.found.__getitem__, self._writing(left, each))]:
                if run.size == each.size.given:
                    group[run] = None
        for group in groups.values():
            if len(group) > 1:
                self.alike.append(list(group))

    def _followers(
        self, left: Mapping[str, Site], each: Wrong, counted: Sequence[str],
        disturbing: Iterable[Sequence[str]], before: Mapping[str, Sequence[Follower]],
    ) -> dict[str, Follower] | Refusal:  # fmt: skip
        """For each site the number of a call that falls with it or stays, where it has none; or why it cannot.

        Args:
            left: all sites by name.
            each: the size.
            counted: the sites whose channels it counts.
            disturbing: sites that may have made it wrong, and more where the first ones have a number already.
            before: the followers with which it was wrong.
        """
        found = self._place_of(each)
        if isinstance(found, Refusal):
            return found
        module, path, place = found
        layout = resolved(each.size.layout)
        counts: dict[str, int] = {}
        for name in counted:
            counts[name] = positions_each(spans(layout, self.trial.found[name]))
        # of channels within each other a number falls by the share of each, where it counts nothing else
        in_parts = all(count * left[name].width == each.size.given for name, count in counts.items())
        is_product = self._is_product(layout, {self.trial.found[name] for name in counted})
        is_rest = self.varies(layout) or is_product
        if is_rest and not self._may_be_rest(left, each, module, path, place):
            if self.varies(layout):
                return Refusal(DEPENDS)
            if not in_parts:
                return Refusal(TWO)
            is_rest = False
        written = Written(path, place, -1 if is_rest else each.size.given)
        wanted: dict[str, Follower] = {}
        for name, count in counts.items():
            wanted[name] = Follower(module, "", 0 if is_rest else count, written)
        for names in disturbing:
            for name in names:
                wanted.setdefault(name, Follower(module, "", 0, written))
            for name, follower in wanted.items():
                for known in left[name].followers:
                    if known != follower and known.module == module and _same_number(known.written, written):
                        return Refusal(OFTEN)
            if any(follower not in before[name] for name, follower in wanted.items()):
                return {name: follower for name, follower in wanted.items() if follower not in left[name].followers}
        return Refusal(OFTEN)

    def _place_of(self, each: Wrong) -> tuple[str, CallPath, int] | Refusal:
        """The module, the call in its forward and the place there at which a size is written; or why it cannot be."""
        call = self.trial.f.trace.calls[each.at]
        found = path_along(each.way)
        if isinstance(found, Refusal):
            return found
        if call.frame.name is None:
            return Refusal("its module has no name")
        path, before_places = found
        place = each.size.place - before_places
        if call.name in SHAPED and not call.kwargs:  # from the end: how many axes stand before may differ
            place = each.size.place - len(leaves(call.args, {}))
        return call.frame.name, path, place

    def _writing(self, left: Mapping[str, Site], each: Wrong) -> list[str]:
        """The sites with which the number at a place falls."""
        found: list[str] = []
        for name, site in left.items():
            for own in site.followers:
                written = own.written
                if written and own.each and (own.module, written.path, written.place) == self._place_of(each):
                    found.append(name)
        return found

    def _is_product(self, layout: Layout, cut: set[Run]) -> bool:
        """Whether channels of two kinds that are cut are within each other."""
        layout = resolved(layout)
        if isinstance(layout, Cat):
            return any(self._is_product(part, cut) for part in layout.parts)
        return isinstance(layout, Prod) and len(cut.intersection(runs(layout))) > 1

    def varies(self, layout: Layout) -> bool:
        """Whether it counts other things than channels of weights: pixels, for instance."""
        return any(run.size > 1 and run not in self._of_weights for run in runs(layout))

    @cached_property
    def _of_weights(self) -> set[Run]:
        return set(self.trial.runs_of([*self.trial.f.trace.weights.values(), *self.trial.f.trace.buffers.values()]))

    def _may_be_rest(self, left: Mapping[str, Site], each: Wrong, module: str, path: CallPath, place: int) -> bool:
        """Whether a size may be -1: none of the call is."""
        call = self.trial.f.trace.calls[each.at]
        if call.name not in ("view", "reshape") or -1 in call.args or any(-1 in a for a in call.args if _is_list(a)):
            return False
        for site in left.values():
            for known in site.followers:
                same = known.module == module and known.written is not None and known.written.path == path
                if same and known.written and known.written.value == -1 and known.written.place != place:
                    return False
        return True


def _is_list(given: object) -> bool:
    return isinstance(given, (tuple, list))


def _same_number(one: Written | None, other: Written) -> bool:
    return one is not None and (one.path, one.place) == (other.path, other.place)
