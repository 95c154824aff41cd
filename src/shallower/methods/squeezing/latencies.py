"""How long each site takes at each width, measured on this machine, as part of what the whole model takes.

    found = site_latencies(model, sites, example_inputs)
    found["encoder.layer.0"].at(384)        # part of the model's time; .at(0) for one linear map in its place

All sites are narrowed alike, for a few widths, and the narrowed model runs in turns with the model as it is: what the
machine does meanwhile falls on both, and a site is timed where it stands, between its first layer and its last. Widths
in between are interpolated. What was measured is kept on disk for the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn
from torch.utils.benchmark import timer
from tqdm.auto import tqdm

from shallower.core.files import read_json, write_json
from shallower.core.inputs import Inputs, call, model_device
from shallower.core.modes import evaluating
from shallower.core.trees import tensors, to_device
from shallower.core.watching import After, Before, watching
from shallower.errors import MethodError
from shallower.measuring.cost import count_params
from shallower.measuring.devices import device_name
from shallower.methods.squeezing.refitting import may_have_path
from shallower.modules.attachment import detached_copy
from shallower.planning.entries import Entry, Fate
from shallower.planning.forms import steps
from shallower.sites import Site
from shallower.surgery.operating import operate

PARTS = 8
"""Widths that are measured: so many equal parts of a site's own."""

_Timed = tuple[float, dict[int, float]]
"""A site's part of the model's time, and for each measured width the part of the site's own."""

_MOST_SHARE = 100
"""Of a site's own time that a narrower one may take; more is no measurement."""

_ROUNDS = 15
_SECONDS = 1.0
"""At most about so long for each measured width, but never fewer than two rounds."""


@dataclass(frozen=True)
class Latency:
    """Of one site, by width.

    Attributes:
        width: of the site as it is.
        part: of the whole model's time that the site takes as it is.
        shares: width -> part of the site's own time, measured; 0 stands for one linear map in the site's place.
    """

    width: int
    part: float
    shares: Mapping[int, float]

    def at(self, width: int) -> float:
        """Part of the model's time as it is that the site takes at this width, 0 for one linear map.

        Between two measured widths it is interpolated, below the least it is taken to go on as above it.
        """
        if width == 0 and 0 in self.shares:
            return self.part * self.shares[0]
        known = {**self.shares, self.width: 1.0}
        widths = sorted(known.keys() - {0})
        if len(widths) == 1:
            return self.part
        i = min(max(bisect_left(widths, width), 1), len(widths) - 1)
        low, high = widths[i - 1], widths[i]
        there, here = known[low], known[high]
        return self.part * max(there + (here - there) * (width - low) / (high - low), 0.0)


def site_latencies(
    model: nn.Module,
    sites: Sequence[Site],
    example_inputs: Inputs,
    *,
    round_to: int = 1,
    collapse: Iterable[str] = (),
    cache: Path | None = None,
) -> dict[str, Latency]:
    """Measured latencies of the sites, by name.

    Args:
        model: with nothing attached to it; it is not changed.
        sites: of this model, whose channels can be kept one by one.
        example_inputs: what it is timed on; batch and shape matter.
        round_to: widths that are measured are multiples of this.
        collapse: sites (by name) that are also measured as one linear map.
        cache: the file for what was measured; by default `cache_file()`. One that cannot be read is written anew.
    """
    path = cache or cache_file()
    inputs = to_device(example_inputs, model_device(model))
    merged = set(collapse)
    shapes = [_shape(site, site.name in merged) for site in sites]
    key = _key(model, shapes, inputs, round_to)
    known = _read(path)
    if len(known.get(key, ())) != len(sites):
        known[key] = _by_shape(_measured_sites(model, sites, inputs, round_to, merged), shapes)
        _write(path, known)
    found = zip(sites, known[key], strict=True)
    return {site.name: Latency(site.width, part, shares) for site, (part, shares) in found}


def candidates(width: int, round_to: int = 1) -> list[int]:
    """Widths that are measured, ascending, without the site's own."""
    found: set[int] = set()
    for part in range(1, PARTS):
        found.add(max(round_to, width * part // PARTS // round_to * round_to))
    return sorted(found.intersection(range(1, width)))


def cache_file() -> Path:
    """Where measured latencies are kept: in $SHALLOWER_CACHE, or the user's cache folder."""
    folder = os.environ.get("SHALLOWER_CACHE") or platformdirs.user_cache_path("shallower")
    return Path(folder) / "latencies.json"


def _measured_sites(
    model: nn.Module, sites: Sequence[Site], inputs: Inputs, round_to: int, merged: set[str]
) -> list[_Timed]:
    """For each site: its part of the model's time, and for each width the part of its own."""
    ladders = {site.name: candidates(site.width, round_to) for site in sites}
    levels = list(range(max(map(len, ladders.values()), default=0)))
    if merged:
        levels.append(-1)  # as linear maps, all at once
    seen: dict[str, _Seen] = defaultdict(_Seen)
    for level in tqdm(levels, desc="measuring latencies", delay=2, leave=False):
        widths = dict.fromkeys(merged, 0)
        if level >= 0:
            widths = {name: ladder[level] for name, ladder in ladders.items() if level < len(ladder)}
        chosen = [site for site in sites if site.name in widths]
        small = narrowed_copy(model, chosen, widths)
        for dense, narrow in _in_turns(model, small, chosen, inputs):
            for name, width in widths.items():
                seen[name].add(width, dense[name], narrow[name], dense[""])
    return [seen[site.name].timed() for site in sites]


@dataclass
class _Seen:
    """What was measured of a site.

    Attributes:
        ratios: of its seconds when it is so wide to those as it is, by width, of each round.
        own, whole: seconds of the site and of the model as they are, over all rounds.
    """

    ratios: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    own: float = 0.0
    whole: float = 0.0

    def add(self, width: int, dense: float, narrow: float, whole: float) -> None:
        """Add a round."""
        self.ratios[width].append(narrow / dense)
        # Sums, not medians: other work on the machine interrupts long passes more often than short sites.
        self.own += dense
        self.whole += whole

    def timed(self) -> _Timed:
        """Its part of the model's time, and for each width the part of its own; nothing where nothing was measured."""
        shares = {width: statistics.median(found) for width, found in self.ratios.items()}
        return self.own / (self.whole or 1.0), shares


def narrowed_copy(
    model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], *, paths: bool = False
) -> nn.Module:
    """A copy with the sites at these widths (0: one linear map), and whatever weights: good for timing only.

    With `paths`, some channels of each site where that can be are a linear path.
    """
    small = detached_copy(model)
    for step in steps(stand_ins(sites, widths, paths=paths)):
        operate(small, step)
    return small


def stand_ins(sites: Iterable[Site], widths: Mapping[str, int], *, paths: bool = False) -> list[Entry]:
    """Entries that make the sites so wide, for those whose width changes; see `stand_in`."""
    entries: list[Entry] = []
    for site in sites:
        if widths[site.name] != site.width:
            entries.append(stand_in(site, widths[site.name], path=paths))
    return entries


def stand_in(site: Site, width: int, *, path: bool = False) -> Entry:
    """An entry that makes the site so wide, 0 for one linear map: what counts is its size and not its channels.

    With `path`, an eighth of the channels are a linear path, where the site can have one.
    """
    if width == 0:
        return Entry.collapse(site)
    entry = Entry.narrow(site, torch.arange(width))
    if not path or width < PARTS or not may_have_path(site):
        return entry
    fates = entry.fates.clone()
    fates[width - width // PARTS : width] = int(Fate.LINEAR)
    return replace(entry, fates=fates)


def _in_turns(
    model: nn.Module, small: nn.Module, sites: Sequence[Site], inputs: Inputs
) -> Iterable[tuple[dict[str, float], dict[str, float]]]:
    """Seconds of each site in both models, round by round, after a pass to warm up."""
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    dense, narrow = _Clock(model), _Clock(small)
    turn = [dense, narrow]
    with evaluating(model), evaluating(small), torch.inference_mode(), ExitStack() as stack:
        for clock in turn:
            stack.enter_context(clock.watching(sites))
            clock.run(inputs)
        start = timer()
        while len(rounds) < _ROUNDS and (len(rounds) < 2 or timer() - start < _SECONDS):
            turn.reverse()  # each is first in every other round
            for clock in turn:
                clock.run(inputs)
            rounds.append((dense.seconds, narrow.seconds))
    return rounds


class _Clock:
    """Times sites where they stand, from the first of their layers to the end of the last consumer, and the model.

    The model is timed from within too: what `call` does around a pass is none of its time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def watching(self, sites: Sequence[Site]) -> Iterator[None]:
        """Time these sites, by their names, and the model, under the name ""."""
        with ExitStack() as stack:
            begins, ends = self._hooks("")
            stack.enter_context(watching(self.model, before={"": begins}, after={"": ends}))
            for site in sites:
                begins, ends = self._hooks(site.name)
                before = dict.fromkeys(site.layers, begins)
                stack.enter_context(watching(self.model, before=before, after={site.consumers[-1].name: ends}))
            yield

    def _hooks(self, name: str) -> tuple[Before, After]:
        def begins(*_: object) -> None:
            self.started.setdefault(name, timer())

        def ends(*_: object) -> None:
            self.seconds[name] = self.seconds.get(name, 0.0) + timer() - self.started.pop(name)

        return begins, ends

    def run(self, inputs: Inputs) -> None:
        """One forward pass; `seconds` are then those of each site, and of all of it under the name ""."""
        self.started, self.seconds = {}, {}
        call(self.model, inputs)


def _by_shape(found: Sequence[_Timed], shapes: Sequence[str]) -> list[_Timed]:
    """Medians over the sites of the same shape, since these differ by noise alone; wider is never faster."""
    groups: dict[str, list[_Timed]] = defaultdict(list)
    for shape, timed in zip(shapes, found, strict=True):
        groups[shape].append(timed)
    alike: dict[str, _Timed] = {}
    for shape, group in groups.items():
        parts, measured = zip(*group, strict=True)
        shares: dict[int, float] = {}
        most = 0.0
        for width in sorted(measured[0]):
            shares[width] = statistics.median(map(itemgetter(width), measured))
            if width > 0:
                shares[width] = most = max(most, shares[width])
        alike[shape] = (statistics.fmean(parts), shares)
    return list(map(alike.__getitem__, shapes))


def _shape(site: Site, merged: bool) -> str:
    """What a site's latency depends on."""
    maps = [
        [m.kind, m.d_in, m.d_out, m.bias, m.positions, m.kernel, m.stride, m.padding, m.dilation, m.groups]
        for m in site.maps
    ]
    slots = [[slot.shape, slot.axis] for slot in site.slots]
    bridge = site.bridge
    found = [maps, slots, site.width, site.calls, site.activation_name, bridge.packed, bool(bridge.norm_before), merged]
    return json.dumps(found)


def _key(model: nn.Module, shapes: Iterable[str], inputs: Inputs, round_to: int) -> str:
    """What latencies depend on, as a hash: the model's and the inputs' shapes, the processor, and how it is used."""
    given = [(str(t.dtype), list(t.shape)) for t in tensors(inputs)]
    weight = next(model.parameters())
    size = [type(model).__name__, count_params(model), len(list(model.modules()))]
    device = [device_name(weight.device), os.cpu_count(), torch.get_num_threads(), str(weight.dtype), torch.__version__]
    text = json.dumps([list(shapes), size, given, device, round_to])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, list[_Timed]]:
    """What was measured before; nothing where the file is missing or damaged."""
    try:
        data = read_json(path, error=MethodError)
        known: dict[str, list[_Timed]] = {}
        for key, found in data.items():
            known[str(key)] = list(map(_checked_latencies, found))
    except (MethodError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return known


def _checked_latencies(timed: Any) -> _Timed:
    """One site's latencies as they stand in the file.

    Raises:
        ValueError: they are damaged.
    """
    part, shares = timed
    found = {int(width): float(share) for width, share in shares.items()}
    if not 0 <= float(part) <= 1 or not all(0 <= share < _MOST_SHARE for share in found.values()):
        raise ValueError("a latency is out of range")
    return float(part), found


def _write(path: Path, known: Mapping[str, list[_Timed]]) -> None:
    """Keep what was measured, if the file can be written."""
    with suppress(MethodError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known, error=MethodError)
