"""Rivals in the arena: published ways to choose channels against squeezing, on the same sites, data and surgery.

Every method narrows the same sites to the same MACs, calibrated on the same data, without training: `squeeze` as it
is by default, `squeeze, equal` with the same share of every site, the same with the rows that make the channels left
as they are (`consumers only`), the rivals that `sh.baseline` has, and Torch-Pruning 1.6.1's group magnitude on hidden
channels. Calibrated on 100 stories (Llama), 1,000 STS-B sentences (MiniLM), 800 CIFAR-10 images (ResNet-56), 250 of
500 ImageNet images (EfficientNet-Lite0; the other 250 report, then the reverse), 100 spoken sentences (Whisper
tiny.en). Figures are means over three sets of calibration data, the same for all methods, or over as many as have
been measured (`sets`, at one half); the intervals are of the difference from `squeeze` on the same sets, 95 % by
Student's t. Time is that of one thread, memory what the process grows by at most, both without judging. Whisper and
EfficientNet-Lite0 stand at one half, with three rivals. Healing is `sh.heal` for the same two passes over the
calibration data, of the first set.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.arena_networks import NETWORKS, Network, with_heads
from benchmarks.record import circumstances, markdown
from benchmarks.squeeze import Subject, by_torch_pruning, growth, remembered
from shallower.errors import DataError, ShallowerError
from shallower.measuring.cost import count_macs, count_params
from shallower.methods.baselines.baseline import baseline
from shallower.methods.baselines.rivals import RIVALS
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.methods.squeezing.sweeping import CalibrationWarning
from shallower.methods.squeezing.uniformity import UniformWarning
from shallower.surgery.applying import apply
from shallower.training.guiding import Healing
from shallower.training.healing import heal

CONSUMERS = "squeeze, equal, consumers only"
OURS = ("squeeze", "squeeze, equal", CONSUMERS)
TORCH_PRUNING = "Torch-Pruning"
BEST = ("flap", "nystrom", "osscar")
"""Rivals that large networks are narrowed by."""

WITH_HEADS = ("random", "magnitude", "energy", "wanda-sp", "flap", "osscar")
SEEDS = 3
QUICK = ("squeeze, equal", "magnitude", "flap", "osscar", "folding", TORCH_PRUNING)
HIDDEN, HEADS = "hidden channels", "hidden channels and heads"
_T = {1: 12.706, 2: 4.303}
"""97.5 % quantile of Student's t, by degrees of freedom."""

_PASSES = 2


def run(data: Path, quick: bool, cache: Path, network: str = "") -> dict[str, Any]:
    """Rows of one network, or of all; of the others those that are in `cache`.

    Raises:
        DataError: there is no network of that name, or none has its data.
    """
    if network and network not in NETWORKS:
        raise DataError(f"there is no network {network!r} in the arena; there are {', '.join(NETWORKS)}")
    _provenance()
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for name, entry in NETWORKS.items():
        bout = Bout(entry, data, cache, quick)
        if network in ("", name) and not (quick and not network and name != "llama"):
            try:
                for at in bout.planned():
                    bout.row(at)
            except DataError as error:
                missing[entry.title] = str(error)
                print(f"arena: {entry.title} is left out: {error}", file=sys.stderr)
        rows += bout.done()
    if not rows:
        raise DataError("; ".join(f"{title}: {reason}" for title, reason in missing.items()))
    return {"command": "python -m benchmarks arena", "rows": rows, "missing": missing}


@dataclass(frozen=True)
class At:
    """Which row: what is narrowed, how far, how and on which calibration data."""

    kinds: str
    cut: float
    method: str
    seed: int
    healed: bool = False

    @property
    def file(self) -> str:
        """The name of its file in the cache."""
        parts = ["heads" if self.kinds == HEADS else "hidden", f"{self.cut:g}", self.method, str(self.seed)]
        return "-".join([*parts, "healed"] if self.healed else parts).replace(", ", "-").replace(" ", "-") + ".json"


class Bout:
    """All methods on one network, each row done once and kept in a file."""

    def __init__(self, network: Network, data: Path, cache: Path, quick: bool) -> None:
        self.network = network
        self.data, self.cache, self.quick = data, cache, quick
        self._subjects: dict[tuple[int, int, str], Subject] = {}

    def planned(self) -> Iterator[At]:
        """Every row, the most telling first."""
        yield At(HIDDEN, 0.0, "dense", 0)
        seeds = range(1 if self.quick else SEEDS)
        first, *others = self.network.cuts
        for seed in seeds:
            for method in self.methods:
                yield At(HIDDEN, first, method, seed)
        if self.quick:
            return
        for seed in seeds:
            for cut in others:
                for method in self.methods:
                    yield At(HIDDEN, cut, method, seed)
            if self.network.heads:
                for method in (*OURS, *WITH_HEADS):
                    yield At(HEADS, 0.5, method, seed)
            if others and seed == 0:
                for method in ("squeeze", best_rival(self.network, self.done()), "magnitude"):
                    yield At(HIDDEN, 0.5, method, seed, healed=True)

    @property
    def methods(self) -> Sequence[str]:
        """That narrow hidden channels of this network."""
        if self.quick:
            return QUICK
        if len(self.network.cuts) == 1:
            return (*OURS, *BEST)
        return (*OURS, *RIVALS, TORCH_PRUNING)

    def row(self, at: At) -> dict[str, Any]:
        """One row, done now if it was not."""
        return remembered(self._folder / at.file, lambda: self._made(at))

    def done(self) -> list[dict[str, Any]]:
        """The rows that are there."""
        return [json.loads(path.read_text()) for path in sorted(self._folder.glob("*.json"))]

    @cached_property
    def _folder(self) -> Path:
        return self.cache / self.network.name

    def _subject(self, at: At, half: int) -> Subject:
        key = (at.seed, half, at.kinds)
        if key not in self._subjects:
            self._subjects.clear()
            made = self.network.subject(self.data, self.cache, at.seed, half, self.quick)
            self._subjects[key] = with_heads(made) if at.kinds == HEADS else made
        return self._subjects[key]

    def _made(self, at: At) -> dict[str, Any]:
        halves: list[dict[str, Any]] = []
        for half in range(self.network.halves):
            halves.append(_measured(self._subject(at, half), at))
        first = halves[0]
        found = {"network": self.network.title, "kinds": at.kinds, "cut": at.cut, "method": at.method, "seed": at.seed}
        if at.healed:
            found["healed"] = True
        found["params"], found["macs"], found["widths"] = first["params"], first["macs"], first["widths"]
        found["scores"] = {name: _mean(part["scores"][name] for part in halves) for name in first["scores"]}
        for unit in ("cpu", "growth", "healing"):
            if unit in first:
                found[unit] = max(part[unit] for part in halves)
        reasons = [part["refused"] for part in halves if "refused" in part]
        if reasons:
            found["refused"] = reasons[0]
        return {**found, **_provenance()}


def _measured(subject: Subject, at: At) -> dict[str, Any]:
    """One method on one network: what it costs, what is left, and how that is judged."""
    found: dict[str, Any] = {}
    with growth() as grown:
        start = time.process_time()
        try:
            small = narrowed(subject, at)
        except ShallowerError as error:
            return {"refused": str(error), "scores": {}, "params": 0, "macs": 0, "widths": {}}
        if at.cut:
            found["cpu"] = time.process_time() - start
    if at.cut:
        found["growth"] = grown[0]
    if at.healed:
        start = time.process_time()
        heal(small, subject.model, subject.batches, Healing(passes=_PASSES))
        found["healing"] = time.process_time() - start
    producers = {site.name: site.layers[0] for site in subject.sites}
    found["widths"] = {name: len(small.get_submodule(layer).weight) for name, layer in producers.items()}  # type: ignore[arg-type]
    found["params"], found["macs"] = count_params(small), count_macs(small, subject.batches[0])
    found["scores"] = subject.score(small)
    return found


def narrowed(subject: Subject, at: At) -> nn.Module:
    """The network with so many of its channels gone."""
    if not at.cut:
        return subject.model
    if at.method == TORCH_PRUNING:
        return by_torch_pruning(subject, at.cut)
    model, sites = subject.model, narrowable(subject.sites)
    target = f"macs:{math.ceil(sites.macs - at.cut * sum(site.macs for site in sites))}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        warnings.simplefilter("ignore", UniformWarning)
        if at.method in OURS:
            options = SqueezeOptions(producers=at.method != CONSUMERS)
            plan = squeeze(model, sites, subject.batches, target, uniform="equal" in at.method, options=options)
        else:
            plan = baseline(at.method, model, sites, subject.batches, target, seed=at.seed)
    first: Any = subject.batches[0]
    example = {k: v[:4] for k, v in first.items()} if isinstance(first, Mapping) else first[:4]
    return apply(model, plan, example)


@cache
def _provenance() -> dict[str, Any]:
    """Where and with what a row was made; the code is that with which the process began."""
    folder = Path(__file__).parent
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    made = circumstances()
    return {"commit": told.stdout.strip(), "machine": made["machine"], "threads": made["threads"]}


def _mean(values: Any) -> float:
    return statistics.fmean(values)


# ---------------------------------------------------------------------- what the rows say


def found(rows: Sequence[dict[str, Any]], at: tuple[str, str, float, str], score: str) -> dict[int, float]:
    """The score of a method by seed: at (network, kinds, cut, method), without healing."""
    network, kinds, cut, method = at
    values: dict[int, float] = {}
    for row in rows:
        same = (row["network"], row["kinds"], row["cut"], row["method"]) == (network, kinds, cut, method)
        if same and not row.get("healed") and score in row["scores"]:
            values[row["seed"]] = row["scores"][score]
    return values


def best_rival(network: Network, rows: Sequence[dict[str, Any]], kinds: str = HIDDEN, cut: float = 0.5) -> str:
    """The rival with the best mean score; of those that are done."""
    means: dict[str, float] = {}
    for method in (*RIVALS, TORCH_PRUNING):
        values = found(rows, (network.title, kinds, cut, method), network.score)
        if values:
            means[method] = _mean(values.values())
    if not means:
        return "osscar"
    return max(means, key=lambda name: means[name] if network.larger else -means[name])


def difference(ours: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float] | None:
    """The mean of other - ours over the seeds of both, and half the width of its 95 % interval (infinite for one)."""
    pairs = [other[seed] - ours[seed] for seed in ours.keys() & other.keys()]
    if not pairs:
        return None
    if len(pairs) - 1 not in _T:
        return _mean(pairs), math.inf
    return _mean(pairs), _T[len(pairs) - 1] * statistics.stdev(pairs) / len(pairs) ** 0.5


def table(results: dict[str, Any]) -> str:
    """A summary; then one table for each network, and one for heads and for healing where there are any."""
    rows = results["rows"]
    parts: list[str] = []
    done = [network for network in NETWORKS.values() if any(row["network"] == network.title for row in rows)]
    parts.append("\n".join(line for network in done for line in _summary(network, rows)))
    for network in done:
        parts += _tables(network, [row for row in rows if row["network"] == network.title])
    for title, reason in results["missing"].items():
        parts.append(f"{title} is not here: {reason}.")
    commits = sorted({row["commit"] for row in rows if row["commit"]})
    parts.append(f"Rows were made at {', '.join(commits)}.")
    return "\n\n".join(part for part in parts if part)


def _summary(network: Network, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line for each cut: the best of ours, the best rival, and which is the better."""
    for kinds, cut in (*((HIDDEN, cut) for cut in sorted(network.cuts)), (HEADS, 0.5)):
        own: dict[str, dict[int, float]] = {}
        for method in OURS:
            values = found(rows, (network.title, kinds, cut, method), network.score)
            if values:
                own[method] = values
        rival = best_rival(network, rows, kinds, cut)
        theirs = found(rows, (network.title, kinds, cut, rival), network.score)
        if not own or not theirs:
            continue
        sign = 1 if network.larger else -1
        ours = max(own, key=lambda name: sign * _mean(own[name].values()))
        apart = difference(own[ours], theirs)
        assert apart is not None
        verdict = f"{ours} is ahead"
        if sign * apart[0] > 0:
            verdict = f"**{rival} is ahead**"
        if math.isinf(apart[1]):
            verdict += ", on one set of calibration data"
        elif abs(apart[0]) <= apart[1]:
            verdict += ", within the interval"
        yield (
            f"- {network.title}, {cut:.0%} of {kinds} cut, {network.score}: {ours} {_text(_mean(own[ours].values()))}, "
            f"{rival} {_text(_mean(theirs.values()))} ({_signed(apart)}): {verdict}."
        )


def _tables(network: Network, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    (dense, *_) = [row for row in rows if row["method"] == "dense"]
    told = "; ".join(f"{name} {_text(value)}" for name, value in dense["scores"].items())
    yield f"{network.title}, dense: {told}."
    for kinds in (HIDDEN, HEADS):
        here = [row for row in rows if row["kinds"] == kinds and row["cut"] and not row.get("healed")]
        if here:
            yield f"{network.title}, {kinds}: {network.score} by the part that is cut; the rest at one half."
            yield _table(network, here)
    healed = [row for row in rows if row.get("healed")]
    if healed:
        yield f"{network.title}, half of {HIDDEN} cut and healed, the first set of calibration data."
        yield _healed_table(network, rows, healed)


def _table(network: Network, rows: Sequence[dict[str, Any]]) -> str:
    cuts = sorted({row["cut"] for row in rows})
    kinds, others = rows[0]["kinds"], [name for row in rows for name in row["scores"] if name != network.score]
    others = list(dict.fromkeys(others))
    lines: list[tuple[str, ...]] = []
    order = [method for method in (*OURS, *RIVALS, TORCH_PRUNING) if any(row["method"] == method for row in rows)]
    for method in order:
        means = [found(rows, (network.title, kinds, cut, method), network.score) for cut in cuts]
        line = [method, *(_text(_mean(values.values())) if values else "" for values in means)]
        apart = None
        if method != "squeeze":
            squeezed, own = (found(rows, (network.title, kinds, 0.5, m), network.score) for m in ("squeeze", method))
            apart = difference(squeezed, own)
        line.append(_signed(apart) if apart else "")
        for name in others:
            values = found(rows, (network.title, kinds, 0.5, method), name)
            line.append(_text(_mean(values.values())) if values else "")
        own_rows = [row for row in rows if row["method"] == method and row["cut"] == 0.5 and "cpu" in row]
        spent = grown = sets = ""
        if own_rows:
            sets = str(len(own_rows))
            spent = f"{_mean(row['cpu'] for row in own_rows):.1f} s"
            grown = f"{max(row['growth'] for row in own_rows) / 2**20:.0f} MiB"
        lines.append((*line, sets, spent, grown))
    header = ("method", *(f"{cut:.0%}" for cut in cuts), "minus squeeze", *others, "sets", "CPU time", "memory growth")
    return markdown(header, lines)


def _healed_table(network: Network, rows: Sequence[dict[str, Any]], healed: Sequence[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = []
    for row in healed:
        before = found(rows, (network.title, HIDDEN, row["cut"], row["method"]), network.score).get(row["seed"])
        was = "" if before is None else _text(before)
        lines.append((row["method"], was, _text(row["scores"][network.score]), f"{row['healing']:.0f} s"))
    return markdown(("method", "before", "healed", "CPU time of healing"), lines)


def _text(value: float) -> str:
    return f"{value:.4g}"


def _signed(apart: tuple[float, float]) -> str:
    """A difference with its interval."""
    mean, half = apart
    if math.isinf(half):
        return f"{mean:+.3g}"
    return f"{mean:+.3g} ± {half:.2g}"
