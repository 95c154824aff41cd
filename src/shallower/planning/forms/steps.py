"""Entries in the order in which the network runs them, each with the form that its site takes there.

done = steps(plan.entries)
[(step.entry.site.name, step.form.kind) for step in done]
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shallower.core.text import listing
from shallower.errors import PlanError
from shallower.planning.entries import Becomes, Entry
from shallower.planning.forms.cuts import TensorsLeft
from shallower.planning.forms.form import Form, totals
from shallower.planning.forms.forming import form_of, form_of_followed, replaces_activation
from shallower.sites import LinearMap, Site, by_name

_AHEAD = 6
"""Following sites over which two forms of one site are compared. What lies farther is rarely changed by it."""


@dataclass(frozen=True)
class Step:
    """An entry of a plan and the form its site takes in the model that the earlier steps left.

    Attributes:
        entry: the fates.
        form: the form.
        last_call: whether nothing calls the site's activation after this step, where several calls shared it: it goes
            under all its names, and its parameters were counted to what this step found.
    """

    entry: Entry
    form: Form
    last_call: bool = False


def steps(entries: Iterable[Entry]) -> list[Step]:
    """The entries in the order in which the network runs them, each with the form that its site takes.

    Where sites overlap - the consumer of one is the producer of the next - a later site starts from what the earlier
    one left: after a full collapse, from the merged map at the consumer's name.

    Raises:
        PlanError: two entries change the same layer in the same role or the same activation, or a linear path does not
            fit what it reads.
    """
    ordered = branches_last(in_execution_order(entries))
    walk = StepWalk(ordered)
    prefer = _chained(ordered)
    return _without_unused([Step(entry, walk.take(entry, walk.best(entry, prefer))) for entry in ordered])


def branches_last(ordered: Iterable[Entry]) -> list[Entry]:
    """The entries, those of branches behind all others, and layers behind these, the last of a list first.

    So the names of all modules are those with which they were found until their own step.

    Raises:
        PlanError: an entry changes what another takes away.
    """
    others: list[Entry] = []
    branches: list[Entry] = []
    layers: list[Entry] = []
    for entry in ordered:
        branch = entry.site.branch
        kind = others if branch is None else layers if branch.layer else branches
        kind.append(entry)
    gone: dict[str, str] = {}
    for entry in (*layers, *branches):
        for name in entry.site.layers:
            gone[name] = entry.site.name
    for entry in (*others, *branches, *layers):
        for name in entry.site.layers:
            around = name.split(".")
            for i in range(1, len(around) + 1):
                owner = gone.get(".".join(around[:i]), entry.site.name)
                if owner != entry.site.name:
                    raise PlanError(
                        f"{entry.site.name}: `{name}` goes with `{owner}`, which the plan drops. Leave one of the two "
                        "out, or apply one first and find the sites again in the result"
                    )
    layers.sort(key=lambda entry: _numbers_in(entry.site.layers[0]), reverse=True)
    return [*others, *branches, *layers]


def _numbers_in(name: str) -> list[tuple[int, str]]:
    """A dotted name as something to sort by, 10 behind 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


def _without_unused(done: Sequence[Step]) -> list[Step]:
    """The steps, those marked after which nothing calls an activation that several calls shared."""
    left: dict[str, int] = {}
    marked = []
    for step in done:
        site, form = step.entry.site, step.form
        origin = site.activation_origin
        if origin and replaces_activation(step.entry):
            left[origin] = left.get(origin, site.activation_calls) - site.calls
            if left[origin] == 0 and site.bridge.shares_activation:
                params, macs = form.before
                form = replace(form, before=(params + site.activation_params, macs))
                step = Step(step.entry, form, last_call=True)
        marked.append(step)
    return marked


class StepWalk:
    """Goes through entries in the order of execution, with the linear maps as the steps so far have left them.

    Attributes:
        maps: by name; those that became identities are in `gone`.
        gone: names of the maps that are no more.
        reads: for a merged map, the map whose input it reads: the first of its chain.
        behind: for each map, the entry whose hidden tensor it makes.
        position: of each entry, by the name of its site.
        tensors: of the followed sites.
    """

    def __init__(self, ordered: Sequence[Entry]) -> None:
        self.maps: dict[str, LinearMap] = {}
        self.gone: set[str] = set()
        self.reads: dict[str, str] = {}
        self.behind: dict[str, Entry] = {}
        self.position: dict[str, int] = {}
        self.tensors = TensorsLeft()
        self._known: dict[tuple[object, ...], Form] = {}
        for i, entry in enumerate(ordered):
            self.position[entry.site.name] = i
            for name in made_by(entry.site):
                self.behind[name] = entry
            for m in entry.site.maps:
                self.maps.setdefault(m.name, m)

    def take(self, entry: Entry, prefer: Becomes = "") -> Form:
        """The form that the next entry's site takes, after which its maps are those of the form."""
        producer = entry.site.producer
        if entry.site.followed:
            form = form_of_followed(entry, self.tensors.cut(entry, self.maps, self.gone))
            if entry.fit is not None:
                for m, bias in zip(entry.site.consumers, entry.fit.biases, strict=True):
                    known = self.maps[m.name]
                    self.maps[m.name] = replace(known, bias=known.bias or bool(bias.ne(0).any()))
            return form
        first = None if producer is None else self.reads.get(producer.name, producer.name)
        form = self._form(entry, prefer, first)
        for m in form.maps:
            self.maps[m.name] = m
        if form.kind not in ("narrower", "partial"):
            self.gone.update(place.module for place in entry.site.bridge.activations if not place.calls)
        if form.kind == "merged" and first is not None:
            for m in form.consumers:
                self.reads[m.name] = first
            self.gone.update(made_by(entry.site))
        return form

    def _form(self, entry: Entry, prefer: Becomes, first: str | None) -> Form:
        """`form_of`, once for the same maps: those of a form that is known are the same objects each time."""
        maps = (id(self.maps[m.name]) for m in entry.site.maps)
        key = (entry.site.name, prefer, first, *maps)
        if key not in self._known:
            self._known[key] = form_of(entry, self.maps, prefer, first)
        return self._known[key]

    def following(self, entry: Entry) -> list[Entry]:
        """An entry and the next ones that read what it writes, or what those write, in order of execution."""
        found, waiting = {entry.site.name: entry}, deque([entry])
        while waiting and len(found) <= _AHEAD:
            for m in waiting.popleft().site.consumers:
                reader = self.behind.get(m.name)
                if reader is not None and reader.site.name not in found:
                    found[reader.site.name] = reader
                    waiting.append(reader)
        return sorted(found.values(), key=lambda reader: self.position[reader.site.name])

    def best(self, entry: Entry, prefer: Mapping[str, Becomes]) -> Becomes:
        """Which of two exact forms the next entry's site is to take: that with which it and the next ones are smaller.

        A depthwise convolution between two others is an example: merging the first two makes more weights, and merging
        those with the third makes fewest.
        """
        near = self.following(entry)
        if len(near) < 2 or not _is_free(entry, prefer):
            return prefer.get(entry.site.name, "")
        try:
            return self._better(near, prefer)
        except PlanError:
            return ""

    def ahead(self, entries: Sequence[Entry]) -> StepWalk:
        """Another walk that has taken these entries, each in its better form."""
        trial = self._copy(entries)
        for i, entry in enumerate(entries):
            trial.take(entry, trial._better(entries[i:], {}))
        return trial

    def _better(self, near: Sequence[Entry], prefer: Mapping[str, Becomes]) -> Becomes:
        """The better form of the first of some entries."""
        forms = self._forms(near, prefer)
        other: Becomes = "merged"
        if forms[0].kind == "merged":
            other = "apart"
        try:
            others = self._forms(near, {**prefer, near[0].site.name: other})
        except PlanError:
            return ""
        (params, macs), (other_params, other_macs) = _cost_added(forms), _cost_added(others)
        if other_params > params or other_macs > macs or (other_params, other_macs) == (params, macs):
            return ""
        return other

    def _forms(self, entries: Sequence[Entry], prefer: Mapping[str, Becomes]) -> list[Form]:
        """The forms of these entries, were they next."""
        trial = self._copy(entries)
        return [trial.take(entry, prefer.get(entry.site.name, "")) for entry in entries]

    def _copy(self, entries: Iterable[Entry]) -> StepWalk:
        """Another walk, with what these entries need."""
        copy = StepWalk(())
        copy._known = self._known
        for entry in entries:
            for m in entry.site.maps:
                copy.maps[m.name] = self.maps[m.name]
            for name in made_by(entry.site):
                if name in self.reads:
                    copy.reads[name] = self.reads[name]
        return copy


def _is_free(entry: Entry, prefer: Mapping[str, Becomes]) -> bool:
    """Whether nothing but its cost decides which form a site takes."""
    return not (len(entry.kept) or entry.becomes or entry.fold_skip or entry.site.name in prefer)


def _cost_added(forms: Iterable[Form]) -> tuple[int, int]:
    """Parameters and MACs that some forms add to what their sites were."""
    (params_before, macs_before), (params, macs) = totals(forms)
    return params - params_before, macs - macs_before


def _chained(ordered: Sequence[Entry]) -> dict[str, Becomes]:
    """The sites that have to merge for a skip to fold into the last map of their chain."""
    before = {c.name: entry for entry in ordered for c in entry.site.consumers}
    wanted: dict[str, Becomes] = {}
    for entry in ordered:
        residual, producer = entry.site.residual, entry.site.producer
        while entry.fold_skip and residual and producer and producer.name != residual.source:
            earlier = before.get(producer.name)
            if earlier is None:
                break
            wanted[earlier.site.name] = "merged"
            producer = earlier.site.producer
    return wanted


def made_by(site: Site) -> tuple[str, ...]:
    """Names of the maps that make a site's hidden tensor: producer and gate, or the projections of its heads."""
    return tuple(by_name(filter(None, (site.producer, site.gate))))


def _read_by(site: Site) -> tuple[str, ...]:
    """Names of the maps that read a site's hidden tensor; none where the site comes after all that names its layers."""
    if site.followed:
        return ()
    return tuple(by_name(site.consumers))


def in_execution_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, sites whose producer is another's consumer after that one; otherwise in the order given.

    Followed sites come last, since their channels are cut out of whatever the other entries leave of their tensors:
    first those that keep every channel and are fitted, then the others with a fit, then those without. After all come
    those whose channels are entries of lists, in which other entries change layers by their names.

    Raises:
        PlanError: a layer is producer, or consumer, at two sites, or an activation is, or the sites run in a circle.
    """
    given = sorted(entries, key=_turn)
    _check_apart(given)
    made = _owners(given, made_by, "the layer")
    read = _owners(given, _read_by, "the layer")
    behind: list[list[int]] = [[] for _ in given]
    waits_for = [0] * len(given)
    for name, i in read.items():
        if name in made:
            behind[i].append(made[name])
            waits_for[made[name]] += 1
    ready = [i for i, count in enumerate(waits_for) if count == 0]
    ordered: list[Entry] = []
    while ready:  # the least position first, so that what is independent keeps its order
        i = heapq.heappop(ready)
        ordered.append(given[i])
        for later in behind[i]:
            waits_for[later] -= 1
            if waits_for[later] == 0:
                heapq.heappush(ready, later)
    if len(ordered) < len(given):
        circle = [entry.site.name for entry, count in zip(given, waits_for, strict=True) if count]
        raise PlanError(f"the sites of this plan run in a circle: {listing(circle)}")
    _owners(given, lambda site: site.bridge.activations, "the activation")
    return ordered


def _turn(entry: Entry) -> tuple[bool, ...]:
    """What comes first: layers by name, those that are only fitted, followed sites that are fitted, those only cut."""
    followed = entry.site.followed
    return followed, bool(entry.site.lists), followed and entry.fit is None, followed and not _is_refit(entry)


def _is_refit(entry: Entry) -> bool:
    """Whether an entry gives layers other weights, and keeps every channel."""
    return entry.fit is not None and len(entry.kept) == entry.site.width


def _check_apart(entries: Sequence[Entry]) -> None:
    """Followed sites cut no axis that another entry cuts by its layers' names, and fit no layer that one changes.

    What cuts a layer comes after what only fits it, and what is cut without a fit after all fits; both take their
    channels out of them.
    """
    cut: dict[tuple[str, str], str] = {}
    fitted: dict[tuple[str, str], str] = {}
    narrowed: dict[tuple[str, str], str] = {}
    for entry in entries:
        site = entry.site
        for name in made_by(site):
            cut[name, "rows"] = site.name
        if not site.followed:  # others are cut through their slots, one after the other
            for m in site.consumers:
                cut[m.name, "columns"] = site.name
        if entry.fit is not None:
            for m in site.maps:
                for side in ("rows", "columns"):
                    fitted.setdefault((m.name, side), site.name)
                    if not (site.followed and _is_refit(entry)):
                        narrowed.setdefault((m.name, side), site.name)
    for entry in entries:
        own = by_name(entry.site.consumers)
        sides = [(slot.module, str(slot.side)) for slot in entry.site.slots]
        if entry.site.followed and entry.fit is not None:
            sides += [(name, "rows") for name in own]
        for layer, side in sides:
            changed = cut
            if entry.fit is not None:
                changed = (fitted if layer in own else narrowed) | cut
            other = changed.get((layer, side), entry.site.name)
            if other != entry.site.name:
                raise PlanError(
                    f"{entry.site.name}: the {side} of `{layer}` are already changed by the entry of `{other}`. Apply "
                    "one of the two first, and find the sites again in the result"
                )


def _owners(entries: Sequence[Entry], parts: Callable[[Site], Iterable[Hashable]], what: str) -> dict[Hashable, int]:
    """The position of the one entry that each part belongs to."""
    owners: dict[Hashable, int] = {}
    for i, entry in enumerate(entries):
        for part in dict.fromkeys(parts(entry.site)):
            if part in owners:
                raise PlanError(
                    f"{entry.site.name}: {what} `{part}` is already changed by the entry of "
                    f"`{entries[owners[part]].site.name}`; a plan has at most one entry for a site"
                )
            owners[part] = i
    return owners
