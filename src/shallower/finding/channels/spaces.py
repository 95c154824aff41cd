"""The spaces of a followed pass as sites: runs of channels, with every tensor in which they stand.

sites, reasons = followed_sites(Following(trace_forward(model, example_inputs)), known=())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from torch import Tensor, nn

from shallower.finding.channels.averages import averages_of
from shallower.finding.channels.choices import CallPlaces, choices_in
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Layout, Run, all_runs, close, divide, resolved, runs, spans
from shallower.finding.channels.readers import plain_readers
from shallower.finding.channels.unread import Unread
from shallower.finding.channels.weights import ATTENTION, WeightUse, attended_products, is_picked, uses_of
from shallower.finding.channels.zeros import close_sums
from shallower.modules.prepared.weight_norms import place_of_weight
from shallower.recording.tracing import Call, Value
from shallower.sites import Follower, LinearMap, Listed, Site, Slot, Span
from shallower.sites.slots import positions_each

ENTANGLED = "its channels are multiplied with each other"
AVERAGED = "an average over its channels is taken at a place that is not found again"


@dataclass(eq=False)
class _Space:
    """A run of channels, and what is known of it.

    Attributes:
        run: the channels.
        slots: where they stand.
        followers: numbers that fall with them.
        position: when the first of its weights is used.
    """

    run: Run
    slots: list[Slot] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    position: int = 1 << 60


@dataclass(frozen=True)
class Found:
    """A space as a site.

    Attributes:
        position: when its first weight is used, counted in calls.
        site: the channels, for plans.
        run: the channels, in the layouts of the pass.
    """

    position: int
    site: Site
    run: Run


def followed_sites(f: Following, known: Iterable[Site]) -> tuple[list[Found], dict[str, str]]:
    """The spaces of a pass that no known site reaches, in order of execution, and why other weights are in none.

    Args:
        f: the followed pass.
        known: sites that were found otherwise.

    Returns:
        The spaces, and name -> reason for layers no axis of which can be cut.
    """
    close_sums(f)
    spaces, closed = _gathered(f)
    _add_followers(f, spaces)
    covered = set(_sides(known))
    streams = _streams(f, spaces.values())
    products, cached = _products(f), _cached(f)
    places = CallPlaces(f)
    averages, choices = averages_of(f, places), choices_in(f, places)
    calls = Counter(map(attrgetter("name"), f.trace.frames))
    unread = Unread(f.trace)
    found: list[Found] = []
    refused: dict[str, str] = {}
    taken = set(map(attrgetter("name"), known))
    for space in sorted(spaces.values(), key=lambda space: space.position):
        if not any(map(attrgetter("side"), space.slots)):
            continue
        if any((slot.module, slot.side) in covered for slot in space.slots):
            continue
        own = averages.get(space.run)
        reason = unread.reason(space.slots)
        if own is None and "averaged" in space.run.marks:
            reason = AVERAGED
        if "chosen" in space.run.marks:
            reason = reason or choices.refusal(f, space.run, space.slots)
        elif f.turns.lists_of(space.run) != ():
            reason = reason or "modules of a list run for its channels, whether they are chosen or not"
        if not all(slot.holds(space.run.size) for slot in space.slots):
            reason = ENTANGLED
        if reason:
            close(space.run, reason)
            for slot in space.slots:
                closed.setdefault(slot.module, reason)
                if slot.side == "rows":
                    refused.setdefault(slot.module, reason)
            continue
        kind = _kind(space, streams)
        name = _name(space, kind, taken)
        taken.add(name)
        consumers: tuple[LinearMap, ...] = ()
        if kind in ("hidden", "heads"):
            consumers = plain_readers(f.trace.model, space.slots, space.run.size, calls)
        site = Site(
            name,
            kind,
            space.run.size,
            None,
            consumers,
            None,
            calls=max([1, *(calls[m.name] for m in consumers)]),
            slots=tuple(space.slots),
            followers=tuple(space.followers),
            averages=own or (),
            choices=choices.of(space.run),
            lists=_lists(f, space.run),
            products_each=products.get(space.run, 0),
            cached_each=cached.get(space.run, 0),
        )
        found.append(Found(space.position, site, space.run))
    for each in found:
        for slot in each.site.slots:
            if slot.side == "rows":
                closed.pop(slot.module, None)
    return found, closed | refused


def _gathered(f: Following) -> tuple[dict[Run, _Space], dict[str, str]]:
    """All runs that stand in parameters and buffers; and the weights none of whose rows can be cut, with the reason."""
    order = {call: i for i, call in enumerate(f.trace.calls)}
    order |= {made: order[original] for made, original in f.stand_ins.items()}
    names = f.trace.names
    spaces: dict[Run, _Space] = {}
    closed: dict[str, str] = {}
    seen: set[Value] = set()
    for (module, attribute), value in [*f.trace.weights.items(), *f.trace.buffers.items()]:
        if value in seen or not value.readers:
            continue
        seen.add(value)
        name = f"{names[module]}.{attribute}".lstrip(".")
        use = uses_of(value)
        if use.calls and use.calls[0] in f.stand_ins:
            use.multiplied = use.output = 0
        for axis, layout in enumerate(f.axes(value)):
            for run in dict.fromkeys(runs(layout)):
                if run.closed or run.size == 1:
                    if use.side(axis) == "rows" and run.closed and value.shape[axis] > 1:
                        closed.setdefault(names[module], run.closed)
                    continue
                space = spaces.setdefault(run, _Space(run))
                space.slots.append(_slot(name, value, axis, spans(layout, run), use))
                if use.calls:
                    space.position = min(space.position, order[use.calls[0]])
    return spaces, closed


def _lists(f: Following, run: Run) -> tuple[Listed, ...]:
    """The lists of modules whose entries some channels are."""
    found: list[Listed] = []
    for name in f.turns.lists_of(run) or ():
        first = next(iter(f.trace.model.get_submodule(name).children()))
        found.append(Listed(name, sum(map(Tensor.numel, first.parameters()))))
    return tuple(found)


def _slot(name: str, value: Value, axis: int, own: list[Span], use: WeightUse) -> Slot:
    return Slot(
        name,
        value.shape,
        axis,
        tuple(own),
        use.side(axis),
        value.origin == "parameter",
        use.multiplied,
        use.output,
        use.shared_out,
    )


def _sides(known: Iterable[Site]) -> Iterator[tuple[str, str]]:
    """The sides of layers at which known sites can be cut already."""
    for site in known:
        if site.bridge.not_narrow is not None:
            continue
        made = [site.producer, site.gate]
        for m in made:
            if m is not None:
                yield m.name, "rows"
        for m in site.consumers:
            yield m.name, "columns"


def _add_followers(f: Following, spaces: dict[Run, _Space]) -> None:
    """The numbers of groups and heads that layers hold, which fall with the channels that are whole ones."""
    names = f.trace.names
    for module, attribute, channels in _counted(f):
        count = vars(module).get(attribute)
        if not isinstance(count, int) or count < 2 or channels.size % count:
            continue
        outer = resolved(divide(channels, count, channels.size // count)[0])
        for run in dict.fromkeys(runs(outer)):
            if run in spaces:
                each = positions_each(spans(outer, run))
                spaces[run].followers.append(Follower(names[module], attribute, each))


def _counted(f: Following) -> Iterator[tuple[nn.Module, str, Layout]]:
    """Layers with numbers of their own, what they call these, and the channels that are divided."""
    for module in f.trace.model.modules():
        weight = f.trace.weights.get(place_of_weight(module))
        if weight is not None and not isinstance(module, nn.modules.conv._ConvTransposeNd):
            for count in ("groups", "num_groups"):
                yield module, count, f.axes(weight)[0]
        if isinstance(module, nn.MultiheadAttention):
            for weight in _projection(f, module):
                yield module, "num_heads", f.axes(weight)[1]
        if isinstance(module, nn.Transformer):  # which compares its width with that of what it reads
            layers = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
            for weight in _projection(f, *layers[:1]):
                yield module, "d_model", f.axes(weight)[0]


def _projection(f: Following, *layers: nn.MultiheadAttention) -> Iterator[Value]:
    """The weights of the maps at the ends of layers of attention, where a recorded parameter holds them."""
    for layer in layers:
        weight = f.trace.weights.get(place_of_weight(layer.out_proj))
        if weight is not None:
            yield weight


def _streams(f: Following, spaces: Iterable[_Space]) -> set[Run]:
    """Runs that linear maps read and write back to, x + F(x): what is added to the channels is computed from them."""
    below: dict[Run, set[Run]] = {}
    columns: dict[str, list[Run]] = {}
    for space in spaces:
        for slot in space.slots:
            if slot.side == "columns":
                columns.setdefault(slot.tensor, []).append(space.run)
    for space in spaces:
        for slot in space.slots:
            if slot.side == "rows":
                for run in columns.get(slot.tensor, ()):
                    below.setdefault(run, set()).add(space.run)
    return {run for run in _added_to(f) if run in below and _reaches(run, below)}


def _added_to(f: Following) -> list[Run]:
    """Runs to which something is added that a linear map has computed from them."""
    bits: dict[Run, int] = {}
    for call in f.sums:
        for run in all_runs(f.axes(call.outputs[0])):
            bits.setdefault(run, 1 << len(bits))
    sums = set(f.sums)
    contracted: dict[Call, int] = {}
    for layout, call in f.contracted:
        contracted[call] = contracted.get(call, 0) | _mask([layout], bits)
    # for each value the runs that linear maps have read on the way to it, one bit each
    behind: dict[Value, int] = {}
    found = 0
    for call in f.trace.calls:
        read = contracted.get(call, 0)
        for value in call.inputs:
            read |= behind.get(value, 0)
        behind |= dict.fromkeys(call.outputs, read)
        if call in sums:
            found |= read & _mask(f.axes(call.outputs[0]), bits)
    return [run for run, bit in bits.items() if found & bit]


def _mask(layouts: Iterable[Layout], bits: dict[Run, int]) -> int:
    found = 0
    for run in all_runs(layouts):
        found |= bits.get(run, 0)
    return found


def _reaches(start: Run, below: dict[Run, set[Run]]) -> bool:
    waiting, seen = list(below[start]), set[Run]()
    while waiting:
        run = waiting.pop()
        if run is start:
            return True
        if run not in seen:
            seen.add(run)
            waiting += below.get(run, ())
    return False


def _products(f: Following) -> dict[Run, int]:
    """For each run, the MACs that one channel has in products of two computed tensors."""
    found: dict[Run, int] = {}
    for call in f.trace.calls:
        two = len(call.inputs) > 1 and all(value.fed and not is_picked(value) for value in call.inputs[:2])
        axes = f.axes(call.outputs[0]) if two else []
        if two and call.name in ("matmul", "bmm"):
            macs = call.outputs[0].elements * call.inputs[0].shape[-1]
        elif two and call.name == "scaled_dot_product_attention" and len(call.inputs) > 2:
            query, key = call.inputs[:2]
            macs = (query.elements + call.outputs[0].elements) * key.shape[-2]
        elif call.name == ATTENTION:
            macs, axes = attended_products(call), f.axes(call.args[11])[1:]
        else:
            continue
        for run in all_runs(axes):
            if not run.closed and run.size > 1:
                found[run] = found.get(run, 0) + macs // run.size
    return found


def _cached(f: Following) -> dict[Run, int]:
    """For each run, the numbers that the KV cache holds of one channel for one token."""
    found: dict[Run, int] = {}
    for value in f.trace.cached:
        rows, _, tokens, _ = value.shape
        for run in all_runs(f.axes(value)):
            if not run.closed:
                found[run] = found.get(run, 0) + value.elements // (rows * tokens * run.size)
    return found


def _kind(space: _Space, streams: set[Run]) -> Literal["hidden", "heads", "stream", "experts"]:
    if "chosen" in space.run.marks:
        return "experts"
    if "attended" in space.run.marks:
        return "heads"
    if space.run in streams:
        return "stream"
    return "hidden"


def _name(space: _Space, kind: str, taken: set[str]) -> str:
    """The layer that makes the channels first; with the kind behind it for a stream, and where the name is taken.

    Heads are called as the module that holds the layer which makes them.
    """
    first = min(filter(attrgetter("side"), space.slots), key=lambda slot: slot.side != "rows")
    module = first.module or first.tensor
    around = module.rpartition(".")[0]
    if kind == "heads" and around and around not in taken:
        return around
    if kind != "stream" and module not in taken:
        return module
    name, count = f"{module}:{kind}", 2
    while name in taken:
        name, count = f"{module}:{kind}{count}", count + 1
    return name
