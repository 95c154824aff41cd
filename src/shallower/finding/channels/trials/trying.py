"""Do the forwards of a model follow when channels are cut: tried on a copy without data, and the numbers that have to.

A forward may hold numbers of its own (how many heads, where to split), or read them from one tensor and give them to
another. A trial cuts every site and leads a pass of the model on the meta device (see `leading.py`), which
shows every size that does not follow. Numbers that modules hold are changed where that puts sizes right (see
`holding.py`), and the rest in the calls that are given them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter

from torch import nn

from shallower.core.inputs import Inputs
from shallower.errors import ShallowerError
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Run, all_runs, runs, tie
from shallower.finding.channels.spaces import followed_sites
from shallower.finding.channels.trials.holding import HeldNumbers, kind_of_site
from shallower.finding.channels.trials.leading import Expected, Led
from shallower.finding.channels.trials.origins import made_of
from shallower.finding.channels.trials.skeletons import Skeleton
from shallower.finding.channels.trials.writing import TWO, WrittenNumbers
from shallower.modules.edits import Number, perform
from shallower.modules.layers import resize_tensors
from shallower.modules.offloading import weightless
from shallower.modules.prepared.lists import Entries
from shallower.modules.rewriting import write_number
from shallower.modules.shrinking import before_cut, fallen
from shallower.modules.written import leaves
from shallower.recording.tracing import Call, Frame, Value
from shallower.sites import Follower, Site

MOST_TRIALS = 100

MOST_KINDS = 12
"""Kinds of sites that are tried alone to find out which is to blame."""

MANY = 8
SHARES = (3 / 4, 5 / 8, 7 / 8, 1 / 2, 11 / 16, 9 / 16, 13 / 16)
"""Of how many channels the sites of one kind leave, where they have at least so many."""

FEW = 16
"""Of fewer channels, two of these shares may be the same number."""

DOES_NOT_FOLLOW = "the forward does not follow fewer channels"


MOST_TIES = 4
"""How often channels that one number counts are tied."""


def that_follow(
    model: nn.Module, inputs: Inputs, f: Following, known: Sequence[Site], kinds: Container[str]
) -> tuple[list[Site], dict[str, str], dict[str, str]]:
    """The sites of some kinds that can be cut, why others cannot, and why other layers are in none.

    Args:
        model: not changed.
        inputs: what it is called with.
        f: the followed pass; channels that can only be cut alike are tied in it.
        known: sites that were found otherwise.
        kinds: of the sites.
    """
    for _ in range(MOST_TIES):
        found, reasons = followed_sites(f, known)
        found = [each for each in found if each.site.kind in kinds]
        trial = ChannelTrial(model, inputs, f, {each.site.name: each.run for each in found})
        settled = trial.settled([each.site for each in found])
        if not trial.tie_alike(settled):
            break
    skipped: dict[str, str] = {}
    for each in found:
        if each.site.name not in settled:
            skipped[each.site.name] = trial.why.get(each.site.name, DOES_NOT_FOLLOW)
    return list(settled.values()), skipped, reasons


class ChannelTrial:
    """Cuts sites of copies of a model, and looks where the pass differs from what the layouts say.

    Attributes:
        f: the followed pass.
        found: the channels of each site.
        why: the reasons of the sites that were left out.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, f: Following, found: Mapping[str, Run]) -> None:
        self.model = model
        self.inputs = inputs
        self.f = f
        self.found = found
        self.why: dict[str, str] = {}
        self._expected = Expected(f)
        self._held = HeldNumbers(self)
        self._written = WrittenNumbers(self)
        self._with_data: bool | None = None
        self._knows_numbers = False
        self._skeleton = Skeleton(model, weightless(model.parameters()))
        self._trials = 0
        self._clean: set[object] = set()
        self._by_experts = any(call.name == "grouped_mm" for call in f.trace.calls)
        self._kinds: dict[object, int] = {}
        self._on_the_way: dict[Call, set[Run]] = {}
        self._in_frames: dict[Frame, set[Run]] = {}

    def settled(self, sites: Sequence[Site]) -> dict[str, Site]:
        """Those of some sites that can be cut, by name, with the numbers that have to fall.

        All are cut together, by other shares where they are of other kinds: where a forward divides one width by
        another, both cut in half would go unnoticed. Then every second one of each kind loses a few channels, then the
        others, and at last those that change a number are cut apart: nothing else may need it to be changed.
        """
        left: dict[str, Site] = {}
        others: list[str] = []
        for site in sites:
            left[site.name] = site
            if site.kind != "experts":
                others.append(site.name)
        if len(others) < len(sites):  # every expert runs as long as none is cut
            self._settle(left, others, one=False)
        self._settle(left, list(left), one=False)
        for start in (0, 1):
            half = [names[start::2] for names in _by_kind(left).values()]
            self._settle(left, list(chain.from_iterable(half)), one=True)
        self._settle_apart(left)
        self._prune(left)
        self._leave_out_dependent(left)
        return left

    def _apart(self, left: Mapping[str, Site], *, written: bool) -> list[list[str]]:
        """Sites to cut together so that of two kinds each is cut without the other, where that changes something.

        Kinds that change nothing beside their tensors are in all of them, if they have shares of their own: where a
        forward gives one width for another, it shows as soon as both are cut. Where only what is written counts, those
        that write no number are in all of them, too.
        """
        changing: list[list[str]] = []
        others: list[str] = []
        for names in _by_kind(left).values():
            first = left[names[0]]
            followers = list(chain.from_iterable(left[name].followers for name in names))
            changes = any(follower.written is not None for follower in followers)
            if changes or (not written and (followers or first.lists or first.width < FEW)):
                changing.append(names)
            else:
                others += names
        found: list[list[str]] = []
        if others:
            found.append(others)
        for bit in range((len(changing) - 1).bit_length()):
            for side in (0, 1):
                half = [names for i, names in enumerate(changing) if i >> bit & 1 == side]
                found.append([*others, *chain.from_iterable(half)])
        return found

    def _settle_apart(self, left: dict[str, Site]) -> None:
        """The same where the numbers have not fallen that other kinds let fall: nothing else may need it."""
        before: dict[str, Site] = {}
        while left != before:
            before = dict(left)
            for names in self._apart(left, written=True):
                self._settle(left, names, one=False)

    def _leave_out_dependent(self, left: dict[str, Site]) -> None:
        """Leave out the sites of one kind that cannot be cut alone: what others changed for them may have gone."""
        doubtful: set[str] = set()
        for i, names in enumerate(self._apart(left, written=False)):
            if not self.led(list(map(left.__getitem__, names)), again=i == 0).is_clean:
                doubtful.update(names)
        before = dict(left)
        for names in _by_kind(left).values():
            if doubtful.isdisjoint(names):
                continue
            led = self.led(list(map(left.__getitem__, names)))
            followers = chain.from_iterable(left[name].followers for name in names)
            if not led.is_clean and any(follower.written is not None for follower in followers):
                self._settle(left, names, one=False)  # one of the numbers was another kind's only
            elif not led.is_clean:
                self._written.note_alike(before, list(led.wrong.values()), names)
                for name in names:
                    del left[name]
                    self.why[name] = f"{DOES_NOT_FOLLOW} where nothing else is cut"

    def _prune(self, left: dict[str, Site]) -> None:
        """Take numbers from sites that can be cut without their being written: their forwards stay as they are.

        Kinds that change nothing in the same module are tried together.
        """
        fewer: dict[object, dict[str, Site]] = {}
        modules: dict[object, set[str | None]] = {}
        for name, site in left.items():
            kind = kind_of_site(site)
            modules.setdefault(kind, set()).update(map(attrgetter("module"), site.followers))
            needed: list[Follower] = []
            for follower in site.followers:
                if follower.written is None or follower.each:
                    needed.append(follower)
            if len(needed) < len(site.followers):
                fewer.setdefault(kind, {})[name] = replace(site, followers=tuple(needed))
        while fewer:
            together: dict[object, dict[str, Site]] = {}
            taken: set[str | None] = set()
            for each in list(fewer):
                if taken.isdisjoint(modules[each]):
                    together[each] = fewer.pop(each)
                    taken |= modules[each]
            self._prune_together(left, together, modules)

    def _prune_together(
        self, left: dict[str, Site], fewer: Mapping[object, dict[str, Site]], modules: Mapping[object, set[str | None]]
    ) -> None:
        """The same for some kinds: those in whose modules something is wrong now keep their numbers."""
        without: dict[str, Site] = {}
        for sites in fewer.values():
            without.update(sites)
        led = self.led(list(without.values()))
        if led.is_clean:
            left.update(without)
            return
        wrong = {self.f.trace.calls[each.at].frame.name for each in led.wrong.values()}
        rest: dict[object, dict[str, Site]] = {}
        for kind, sites in fewer.items():
            if wrong.isdisjoint(modules[kind]):
                rest[kind] = sites
        if 0 < len(rest) < len(fewer):
            self._prune_together(left, rest, modules)
        elif len(rest) > 1:
            for one in rest.items():
                self._prune_together(left, dict([one]), modules)

    def runs_in(self, frame: Frame) -> set[Run]:
        """The channels of what the forward of a module is given, and of what its own calls read and give."""
        if frame not in self._in_frames:
            values = given_to(frame)
            for step in frame.steps:
                values += step.outputs
                if isinstance(step, Call):
                    values += step.inputs
            self._in_frames[frame] = set(self.runs_of(values))
        return self._in_frames[frame]

    def _settle(self, left: dict[str, Site], names: Sequence[str], *, one: bool) -> None:
        """Give those sites of `left` that are named the numbers that have to fall, or take them out."""
        while chosen := [left[name] for name in names if name in left]:
            if self._trials >= MOST_TRIALS:
                self._give_up(left, chosen)
                return
            led = self.led(chosen, one=one)
            if led.is_clean or (self._with_data is None and self._needs_data()):
                if led.is_clean:
                    return
                continue
            if led.blamed and self._keeps_numbers():
                continue
            before = dict(left)
            if self._held.take(left, chosen, led, one=one):
                if led.ended is not None:  # the pass goes further now, and shows more
                    continue
                led = self.led([left[site.name] for site in chosen], one=one)
            within = self._written.write(left, chosen, led.wrong.values())
            if left == before:
                self._leave_out_blamed(left, chosen, led)
            if left == before:
                self._leave_out_within(left, within)
            if left == before:
                self._halve(left, chosen, one=one)
                return

    def _needs_data(self) -> bool:
        """Whether the forward looks at numbers, so that it does not run without them, even with nothing cut."""
        self._with_data = False
        self._with_data = not self.led([]).is_clean
        if self._with_data:
            self._skeleton = Skeleton(self.model, {})
            self._clean.clear()
        return self._with_data

    def _keeps_numbers(self) -> bool:
        """Whether calls compute with numbers that are made of the sizes of channels alone, which can be written."""
        if self._knows_numbers:
            return False
        self._knows_numbers = True
        with self._skeleton.lent() as trial:
            found = made_of(self._expected, trial, self.inputs)
        known, kept = set(self.found.values()), 0
        for (i, place), axes in found.items():
            # an axis with channels of a site, and nothing that may be larger with other inputs
            if all(known.intersection(runs(axis)) and not self._written.varies(axis) for axis in axes):
                kept += 1
                self._expected.keep(i, place)
        return kept > 0

    def _give_up(self, left: dict[str, Site], chosen: Iterable[Site]) -> None:
        for site in chosen:
            del left[site.name]
            self.why[site.name] = f"it was not tried: the search was given up after {MOST_TRIALS} trials"

    def _halve(self, left: dict[str, Site], chosen: Sequence[Site], *, one: bool) -> None:
        """The same where it does not show which site is to blame."""
        names = [site.name for site in chosen if site.name in left]
        if len(names) == 1:
            del left[names[0]]
            return
        half = len(names) // 2
        self._settle(left, names[:half], one=one)
        self._settle(left, names[half:], one=one)

    # ------------------------------------------------------------------------------------------------- blame

    def _leave_out_blamed(self, left: dict[str, Site], chosen: Sequence[Site], led: Led) -> None:
        """Leave out the sites because of which calls gave something else.

        Those are to blame at whose kind alone a call does so too: it need not read their channels, as where scores are
        divided by what the features of a head were counted to be. Where none is alone, all that meet there are.
        """
        blamed = self.blamed_calls(led)
        kinds: dict[object, list[str]] = {}
        for site in chosen:
            if blamed and site.name in left:
                kinds.setdefault(kind_of_site(left[site.name]), []).append(site.name)
        alone: dict[object, list[Call]] = {}
        if 1 < len(kinds) <= MOST_KINDS:
            for kind, names in kinds.items():
                alone[kind] = self.blamed_calls(self.led(list(map(left.__getitem__, names))))
        for call in blamed:
            guilty: list[str] = []
            for kind, names in kinds.items():
                if call in alone.get(kind, ()):
                    guilty += names
            for name in guilty or self.met(call, chosen):
                self.leave_out(left, name, call)

    def blamed_calls(self, led: Led) -> list[Call]:
        """The calls at which a pass was another one although sizes were right, in order."""
        blamed = set(led.blamed)
        if led.ended is not None and led.ended < len(self.f.trace.calls):
            blamed.add(led.ended)
        return list(map(self.f.trace.calls.__getitem__, sorted(blamed)))

    def met(self, call: Call, sites: Iterable[Site]) -> list[str]:
        """The sites whose channels a call reads or gives."""
        return [site.name for site in sites if self.holds(call, self.found[site.name])]

    def holds(self, call: Call, run: Run) -> bool:
        """Whether a call reads or gives some channels."""
        return run in self._runs_at(call)

    def _runs_at(self, call: Call) -> set[Run]:
        if call not in self._on_the_way:
            self._on_the_way[call] = set(self.runs_of([*call.inputs, *call.outputs]))
        return self._on_the_way[call]

    def leave_out(self, left: dict[str, Site], name: str, call: Call, why: str = "") -> None:
        """A site cannot be cut because of a call."""
        if left.pop(name, None) is not None:
            self.why[name] = f"{DOES_NOT_FOLLOW} at {self.f.title(call)}" + f": {why}" * bool(why)

    def _leave_out_within(self, left: dict[str, Site], within: Counter[str]) -> None:
        """Leave out a site whose channels are in numbers with those of others, which can be cut without it.

        It is the one that is in most of them; heads stay rather than their features, and the wider rather than others.
        """
        waiting = [name for name in within if name in left]
        for name in sorted(waiting, key=lambda name: (-within[name], left[name].kind == "heads", left[name].width))[:1]:
            del left[name]
            self.why[name] = f"{DOES_NOT_FOLLOW}: {TWO}"

    def tie_alike(self, settled: Container[str]) -> bool:
        """Tie channels that one number counts and that cannot be cut by themselves; whether there are any."""
        names = {run: name for name, run in self.found.items()}
        tied = False
        for first, *others in self._written.alike:
            if not any(names[run] in settled for run in (first, *others)):
                for run in others:
                    tie(first, run)
                tied = True
        return tied

    def runs_of(self, values: Iterable[Value]) -> list[Run]:
        """The channels of some values."""
        return all_runs(chain.from_iterable(map(self.f.axes, values)))

    # ------------------------------------------------------------------------------------------------- passes

    def led(self, sites: Sequence[Site], *, one: bool = False, again: bool = False) -> Led:
        """A pass with these sites cut: each by the share of its kind, or again by another, or by a few channels."""
        kept: dict[str, int] = {}
        fewer: dict[Run, int] = {}
        for site in sites:
            kept[site.name] = self._few_less(site) if one else self._share_of(site, again)
            fewer[self.found[site.name]] = kept[site.name]
        led = Led(self._expected, fewer)
        cut = frozenset((site.name, site.followers, kept[site.name]) for site in sites)
        if cut in self._clean:
            return led
        self._trials += 1
        with self._skeleton.lent() as trial:
            try:
                self._cut(trial, sites, kept, fewer)
            except ShallowerError:
                led.ended = 0
                return led
            led.run(trial, self.inputs)
        if led.is_clean:
            self._clean.add(cut)
        return led

    def _share_of(self, site: Site, again: bool) -> int:
        """How many channels a trial leaves: half of few, and of many a share that no other kind has, nearly.

        Kinds that have the same share have others when they are tried again.
        """
        kind = self._kinds.setdefault(kind_of_site(site), len(self._kinds))
        if again:
            kind += kind // len(SHARES)
        unit = self._unit_of(site)
        lost = max(unit, round(site.width * (1 - SHARES[kind % len(SHARES)]) / unit) * unit)
        if site.width < MANY:
            lost = site.width // 2
        return max(site.width - lost, site.least)

    def _few_less(self, site: Site) -> int:
        """How many channels a trial leaves that takes few."""
        return max(site.width - self._unit_of(site), site.least)

    def _unit_of(self, site: Site) -> int:
        """How many channels a trial takes at a time: one, but products by experts count in 16 bytes."""
        if not self._by_experts or site.width <= 4:
            return 1
        return 8 if site.width > 16 else 4

    def _cut(self, trial: nn.Module, sites: Sequence[Site], kept: Mapping[str, int], fewer: Mapping[Run, int]) -> None:
        """Leave the first channels of each site, without numbers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for site in sites:
            for slot in site.slots:
                shapes[slot.tensor] = ()
        for edit in before_cut(trial, shapes):
            perform(trial, edit)
        for site in sites:
            for fall in fallen(trial, site.followers, site.width, site.width - kept[site.name]):
                if isinstance(fall, Number):
                    write_number(trial.get_submodule(fall.name), fall.written, fall.value)
                else:
                    perform(trial, fall)
        for name in shapes:
            shapes[name] = self._expected.shape(self._expected.tensors[name], fewer)
        resize_tensors(trial, shapes)
        if self._with_data:
            for name, tensor in chain(trial.named_parameters(), trial.named_buffers()):
                if name in shapes:
                    tensor.detach().zero_()
        for site in sites:
            for listed in site.lists:
                perform(trial, Entries(listed.module, tuple(range(kept[site.name]))))


def _by_kind(sites: Mapping[str, Site]) -> dict[object, list[str]]:
    """The names of sites that are alike."""
    kinds: dict[object, list[str]] = {}
    for name, site in sites.items():
        kinds.setdefault(kind_of_site(site), []).append(name)
    return kinds


def given_to(frame: Frame) -> list[Value]:
    """The values that a module is called with."""
    return [item for item in leaves(frame.args, frame.kwargs) if isinstance(item, Value)]
