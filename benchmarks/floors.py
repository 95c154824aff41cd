"""The floors of squeezing: what a given time of one thread must reach, on real networks, without labels.

Each row is squeezed, and healed where it says so, within its CPU time, by the library's public functions alone.
ResNet-56 is judged on the first 4,000 test images of CIFAR-10; EfficientNet-Lite0 on 250 of 500 ImageNet images
after calibration on the other 250, then the reverse; Whisper tiny.en on the loss of the text of 60 spoken sentences;
the Llama of 260K parameters, calibrated and healed on the first 30,000 tokens of its training stories, on the test
stories.
MiniLM at half of all MACs is squeezed with and without its attention heads among the sites. A network of BERT-base's
shape has weights drawn at random: only the cost is looked at, in passes of the dense network over the same data.
The machine was shared: with two busy processes on each core the same work takes up to twice the CPU time, and what is
healed for a given time gets fewer steps.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.arena_networks import classified, efficientnet, whisper, with_heads
from benchmarks.images import cifar10
from benchmarks.record import markdown
from benchmarks.squeeze import Subject, minilm, normalised, remembered, resnet, stories
from shallower.core.inputs import call
from shallower.errors import DataError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_macs, count_params
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.surgery.applying import apply
from shallower.training.guiding import Healing
from shallower.training.healing import heal


@dataclass(frozen=True)
class Floor:
    """What is to be reached.

    Attributes:
        network: for people, and as its words begin for the command line.
        subject: the network and its data, from the folders of the data and of the cache and the half that is judged.
        target: what is left: `macs:60%`, or a number, the part of the sites' own MACs that goes.
        aims: (score, value, whether more is better).
        seconds: of CPU time, for all of it; None for as long as it takes.
        healed: heal for what is left of the time.
        halves: how often calibration data and reported rows change places.
    """

    network: str
    subject: Callable[[Path, Path, int], Subject]
    target: str | float
    aims: Sequence[tuple[str, float, bool]] = ()
    seconds: float | None = None
    healed: bool = False
    halves: int = 1

    @property
    def name(self) -> str:
        """Of its row."""
        way = "squeezed"
        if self.healed:
            way = f"healed-{self.seconds:g}"
        return re.sub("[^a-z0-9.]+", "-", f"{self.network} {self.target} {way}".lower())


def run(data: Path, quick: bool, cache: Path, only: str = "") -> dict[str, Any]:
    """All rows, or those whose names begin like `only` and those in `cache`.

    Raises:
        DataError: no row has its data.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    floors: Sequence[Floor] = FLOORS
    if quick:
        floors = [replace(floor, seconds=5) for floor in FLOORS if floor.network.startswith("Llama")][:1]
    for floor in floors:
        kept = cache / f"{floor.name}.json"
        if not floor.name.startswith(only) and not kept.exists():
            continue
        try:
            rows.append(remembered(kept, lambda f=floor: _row(f, data, cache)))  # type: ignore[misc]
        except DataError as error:
            missing[floor.network] = str(error)
    costs: list[dict[str, Any]] = []
    for producers, most in () if quick else ((False, 15), (True, 25)):
        name = f"bert-base-cost-{'producers' if producers else 'consumers'}"
        kept = cache / f"{name}.json"
        if name.startswith(only) or kept.exists():
            costs.append(remembered(kept, lambda p=producers, m=most: _cost(p, m)))  # type: ignore[misc]
    if not rows and not costs:
        raise DataError("; ".join(f"{network}: {reason}" for network, reason in missing.items()))
    return {"rows": rows, "costs": costs, "missing": missing}


def table(results: dict[str, Any]) -> str:
    """One line for each floor."""
    lines: list[tuple[str, ...]] = []
    for row in results["rows"]:
        told = "; ".join(f"{name} {value:.4g}" for name, value in row["scores"].items())
        before = "; ".join(f"{name} {value:.4g}" for name, value in row["dense"].items())
        aims: list[str] = []
        for name, value, larger in row["aims"]:
            reached = row["scores"][name] >= value if larger else row["scores"][name] <= value
            late = row["seconds"] is not None and row["cpu"] > row["seconds"]
            found = "reached" if reached and not late else "reached **late**" if reached else "**missed**"
            aims.append(f"{name} {value:g} {found}")
        limit = "" if row["seconds"] is None else f" of {row['seconds']:g}"
        lines.append((row["network"], row["what"], before, told, "; ".join(aims), f"{row['cpu']:.0f}{limit} s"))
    text = markdown(("network", "left", "dense", "result", "floor", "CPU time"), lines)
    for row in results["costs"]:
        text += (
            f"\n\nBERT-base's shape to 70 % of the MACs, {row['what']}: as much CPU time as {row['dense passes']:.1f} "
            f"passes of the dense network over the data, at most {row['most']} wanted; {row['passes']:g} passes are "
            "those of networks, the rest is algebra."
        )
    for network, reason in results["missing"].items():
        text += f"\n\n{network} is not here: {reason}."
    return text


def _row(floor: Floor, data: Path, cache: Path) -> dict[str, Any]:
    halves: list[dict[str, Any]] = []
    for half in range(floor.halves):
        halves.append(_measured(floor, floor.subject(data, cache, half)))
    found = halves[0]
    for part in ("dense", "scores"):
        found[part] = {name: sum(h[part][name] for h in halves) / len(halves) for name in found[part]}
    found["cpu"] = max(h["cpu"] for h in halves)
    return found


def _measured(floor: Floor, subject: Subject) -> dict[str, Any]:
    """Squeezed and healed within the time, and judged."""
    model, batches = subject.model, subject.batches
    sites = narrowable(subject.sites)
    target = floor.target
    if not isinstance(target, str):
        target = f"macs:{math.ceil(sites.macs - target * sum(site.macs for site in sites))}"
    dense = subject.score(model)
    history = None
    start = time.process_time()
    plan = squeeze(model, sites, batches, target, options=SqueezeOptions(collapse=False))
    small = apply(model, plan, _first(batches[0]))
    squeezed = time.process_time() - start
    if floor.healed and floor.seconds is not None and floor.seconds > squeezed + _LEAST:
        with _cpu_clock():
            history = heal(
                small,
                model,
                subject.others.get("healing", batches),
                Healing(passes=100, seconds=floor.seconds - squeezed),
            )
    spent = time.process_time() - start
    macs = count_macs(small, batches[0]) / count_macs(model, batches[0])
    params = count_params(small) / count_params(model)
    return {
        "network": floor.network,
        "what": f"{macs:.1%} of the MACs, {params:.1%} of the parameters",
        "target": floor.target,
        "healed": None if history is None else {"lr": history.lr, "scores": history.scores, "before": history.before},
        "aims": floor.aims,
        "seconds": floor.seconds,
        "squeezing": squeezed,
        "cpu": spent,
        "widths": [len(entry.kept) for entry in plan.entries],
        "dense": dense,
        "scores": subject.score(small),
    }


@contextmanager
def _cpu_clock() -> Iterator[None]:
    """Limits of time count the CPU time of this process, whatever else the machine does."""
    with mock.patch("time.perf_counter", time.process_time):
        yield


def _first(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: tensor[:4] for name, tensor in batch.items()}
    return batch[:4]


def _llama(data: Path, _cache: Path, _half: int) -> Subject:
    """The first stories, of 30,000 tokens together."""
    return stories(data, False, tokens=30_000)


def _resnet(data: Path, cache: Path, _half: int) -> Subject:
    """As in `squeeze`, and 5,000 training images to heal on."""
    found = resnet(data, cache)
    train, test = (cifar10(data, split, cache.parent) for split in ("train", "test"))
    judged = torch.split(normalised(test[:4000]), 250)
    score = classified(found.model, judged, test.labels[:4000])
    images = list(torch.split(normalised(train[:5000]), 100))
    return replace(found, score=score, others={"healing": images})


def _lite(data: Path, cache: Path, half: int) -> Subject:
    found = efficientnet(data, cache, 0, half, False)
    score = found.score
    before = score(found.model)["accuracy"]

    def lost(small: nn.Module) -> dict[str, float]:
        scores = score(small)
        return {"points lost": before - scores["accuracy"], **scores}

    return replace(found, score=lost)


def _whisper(data: Path, cache: Path, _half: int) -> Subject:
    return whisper(data, cache, 0, 0, False)


def _whisper_mlps(data: Path, cache: Path, half: int) -> Subject:
    found = _whisper(data, cache, half)
    sites = found.sites.select(lambda site: site.kind == "feed-forward")
    score = found.score
    before = score(found.model)["loss of the text"]

    def more(small: nn.Module) -> dict[str, float]:
        scores = score(small)
        return {"nats more": scores["loss of the text"] - before, **scores}

    return replace(found, sites=sites, score=more)


def _minilm(data: Path, _cache: Path, _half: int) -> Subject:
    return minilm(data)


def _minilm_heads(data: Path, cache: Path, half: int) -> Subject:
    return with_heads(_minilm(data, cache, half))


def _bert() -> Subject:
    """BERT-base's shape with random weights, 128 rows of 128 tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    ids = torch.randint(1000, 30_000, (128, 128))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, 16)]
    sites = find_sites(model, {name: tensor[:2] for name, tensor in batches[0].items()})
    return Subject("BERT-base", model, sites, batches, _nothing, ())


def _nothing(_small: nn.Module) -> dict[str, float]:
    return {}


def _cost(producers: bool, most: int) -> dict[str, Any]:
    """What squeezing costs in passes of the dense network over the same data."""
    subject = _bert()
    start = time.process_time()
    with torch.no_grad():
        for batch in subject.batches:
            call(subject.model, batch)
    once = time.process_time() - start
    start = time.process_time()
    options = SqueezeOptions(producers=producers)
    plan = squeeze(subject.model, subject.sites, subject.batches, "macs:70%", options=options)
    what = "producers refitted too" if producers else "consumers refitted"
    spent = (time.process_time() - start) / once
    return {"what": what, "most": most, "dense pass": once, "dense passes": spent, "passes": plan.passes}


_LEAST = 5.0
"""Seconds of healing that are worth a try."""

ACCURACY, PERPLEXITY = "accuracy", "perplexity"
FLOORS = (
    Floor("ResNet-56", _resnet, 0.5, [(ACCURACY, 92.0, True)], 100),
    Floor("Llama of 260K parameters", _llama, 0.5, [(PERPLEXITY, 8.3, False)], 30, True),
    Floor("Llama of 260K parameters", _llama, 0.5, [(PERPLEXITY, 7.6, False)], 60, True),
    Floor("Llama of 260K parameters", _llama, 0.25, [(PERPLEXITY, 5.75, False)], 60, True),
    Floor("ResNet-56", _resnet, 0.25, [(ACCURACY, 93.0, True)], 100),
    Floor("ResNet-56", _resnet, 0.5, [(ACCURACY, 92.0, True)], 100, True),
    Floor("ResNet-56", _resnet, 0.25, [(ACCURACY, 93.0, True)], 100, True),
    Floor("Whisper tiny.en, MLPs", _whisper_mlps, 0.5, [("nats more", 0.10, False)], 150),
    Floor("EfficientNet-Lite0", _lite, "macs:80%", [("points lost", 2, False), ("agreement", 90, True)], halves=2),
    Floor("EfficientNet-Lite0", _lite, "macs:60%", [("points lost", 8, False), ("agreement", 80, True)], halves=2),
    Floor("MiniLM, MLPs alone", _minilm, "macs:50%"),
    Floor("MiniLM, heads too", _minilm_heads, "macs:50%"),
)
