"""All ways to make one network narrower, at the same share of the channels everywhere; each is done once.

A `Case` declares a network, its data and how it trains. `ROWS` are the ways, from networks trained for their width to
Structural Dropout; `Bench.accuracies` gives what one of them reaches at every share, and keeps it in a file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.record import stage, write_json
from shallower.calibrating.recalibration import recalibrate
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_params
from shallower.methods.dropout.options import DropoutOptions
from shallower.methods.dropout.ordering import by_magnitude
from shallower.methods.dropout.structural_dropout import StructuralDropout
from shallower.methods.squeezing.squeeze import squeeze
from shallower.methods.squeezing.uniformity import UniformWarning
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Site, Sites
from shallower.surgery.applying import apply
from shallower.training import Recipe, train

QUARTERS = (0.75, 0.5, 0.25)
Accuracies = dict[float, float]
"""Test accuracy by share of the channels."""


@dataclass(frozen=True)
class Case:
    """One network, its data, and at what widths it is measured.

    Attributes:
        title: for people.
        make: the dense network before training, from a seed.
        batches, loss, recipe: how it trains; the recipe has the seed of all that is random.
        held_out, test: share of rows classified rightly.
        calibration: inputs, for squeezing and for BatchNorm statistics.
        example: inputs to find the sites with.
        anchors: shares of the channels at which a network is trained for itself and the dense one is cut.
        shares: at which a network that was trained at all widths is measured.
        heads: whether attention heads are narrowed, too.
        start: of a narrower network that is trained for itself: weights drawn "anew", for its own fan-in; the "first"
            of the wide network's, where these do not depend on the fan-in; the "largest", where they are trained ones.
        search: widths at which `curve` tries each site alone.
        points: of the curve; 0 leaves it out.
    """

    title: str
    make: Callable[[int], nn.Module]
    batches: Any
    loss: Callable[[nn.Module, Any], Tensor]
    recipe: Recipe
    held_out: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]
    calibration: list[Any]
    example: Any
    anchors: Sequence[float] = QUARTERS
    shares: Sequence[float] = (1.0, *QUARTERS)
    heads: bool = False
    start: Literal["anew", "first", "largest"] = "anew"
    search: int = 2
    points: int = 6

    def model(self) -> nn.Module:
        """The dense network before training."""
        return self.make(self.recipe.seed)

    def sites(self, model: nn.Module) -> Sites:
        """All that squeezing can narrow, and heads; not the convolution whose average over pixels is classified."""
        found = find_sites(model.eval(), self.example, kinds=("hidden", "heads") if self.heads else "hidden")
        return found.select(lambda s: not s.not_narrow and not s.pooled and len({m.kind for m in s.maps}) == 1)

    def widths(self, sites: Sites, share: float, heads: bool = True) -> dict[str, int]:
        """The same share of every site's channels; all heads where they are not to be narrowed."""
        narrow = {s.name: heads or not _is_heads(s) for s in sites}
        return {s.name: max(1, round(share * s.width)) if narrow[s.name] else s.width for s in sites}

    def narrowed(self, model: nn.Module, widths: Mapping[str, int], *, largest: bool = True) -> nn.Module:
        """A network with so many channels at each of the sites that are named, the largest ones or the first."""
        sites = self.sites(model).select(lambda s: widths.get(s.name, s.width) < s.width)
        if not len(sites):
            return copy.deepcopy(model)
        orders = by_magnitude(model, sites) if largest else {s.name: torch.arange(s.width) for s in sites}
        entries = [Entry.narrow(s, orders[s.name][: widths[s.name]]) for s in sites]
        return apply(model, Plan(tuple(entries)), self.example)

    def params(self, share: float) -> int:
        """Parameters of the network with that share of the channels."""
        model = self.model()
        return count_params(self.narrowed(model, self.widths(self.sites(model), share), largest=False))

    @property
    def has_norms(self) -> bool:
        """Whether there are BatchNorms, whose statistics are measured anew at each width."""
        return any(isinstance(m, nn.BatchNorm2d) for m in self.model().modules())


@dataclass(frozen=True)
class Part:
    """So many batches of each epoch, drawn anew: short epochs over many rows."""

    batches: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.batches))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.count)


class Bench:
    """The trainings of one case."""

    def __init__(self, case: Case, cache: Path) -> None:
        self.case, self.cache = case, cache

    def kept(self, name: str, work: Callable[[], Any], *settings: Any) -> Any:
        """What `work` gives, from a file where it is there; other settings are another file."""
        case = self.case
        path = stage(
            self.cache, name.replace(" ", "-"), case.title, case.recipe, len(case.batches), *settings
        ).with_suffix(".json")
        if not path.exists():
            write_json(path, {"found": work()})
        return json.loads(path.read_text())["found"]

    def accuracies(self, name: str) -> Accuracies:
        """What the row `name` of `ROWS` reaches."""
        row, case = ROWS[name], self.case
        settings = (DEFAULTS if row.ours else "", list(case.anchors), list(case.shares))
        found = self.kept(name, lambda: list(row.accuracies(self).items()), *settings)
        return dict(found)

    # ------------------------------------------------------------------ trainings

    def trained(
        self, name: str, model: nn.Module, method: StructuralDropout | None = None, epochs: int = 0, settings: Any = ()
    ) -> nn.Module:
        """`model`, trained; for other than the recipe's epochs where given."""
        case = self.case
        recipe = dataclasses.replace(case.recipe, epochs=epochs or case.recipe.epochs)
        path = stage(self.cache, name, recipe, len(case.batches), settings)
        train(model, case.batches, case.loss, recipe, method=method, checkpoint=path, label=f"{case.title}, {name}")
        return model.eval()

    def dense(self) -> nn.Module:
        """The network as it is, trained."""
        return self.trained("dense", self.case.model())

    def separate(self, share: float) -> nn.Module:
        """A network of that width, trained for itself."""
        case, model = self.case, self.case.model()
        small = case.narrowed(model, case.widths(case.sites(model), share), largest=case.start == "largest")
        if case.start == "anew":
            torch.manual_seed(case.recipe.seed)
            for module in small.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        return self.trained(f"separate-{share:.4f}", small)

    def nested(
        self, name: str, epochs: int = 0, *, dense: bool = False, published: bool = False, **options: Any
    ) -> tuple[nn.Module, StructuralDropout]:
        """A network trained at all widths, from the start or from the trained dense network.

        Args:
            name: of the training.
            epochs: for other than the recipe's.
            dense: start from the dense network.
            published: by the paper's rule.
            options: that differ from this project's defaults.
        """
        seed = self.case.recipe.seed
        model = self.dense() if dense else self.case.model()
        sites = self.case.sites(model)
        if published:
            method = StructuralDropout.as_published(model, sites, seed=seed)
        else:
            changed = {"seed": seed, "logits": True} | options
            sort = changed.pop("sort", "magnitude")
            method = StructuralDropout(model, sites, DropoutOptions(**changed), sort=sort)
        settings = "" if published else [DEFAULTS, options]
        return self.trained(name, model, method, epochs, settings), method

    def epochs_in_published_time(self) -> int:
        """Epochs that our defaults get through while the published rule does the recipe's."""
        costs = self.costs()
        return max(1, round(self.case.recipe.epochs * costs["published / dense"] / costs["defaults / dense"]))

    def time(self, dense: float = 0.0, published: float = 0.0, ours: float = 0.0) -> float:
        """Of trainings for such parts of the recipe's steps, in that of the dense network."""
        costs = self.costs()
        return dense + published * costs["published / dense"] + ours * costs["defaults / dense"]

    @property
    def half(self) -> int:
        """Half of the recipe's epochs."""
        return max(1, self.case.recipe.epochs // 2)

    # ------------------------------------------------------------------ what is measured

    def scored(
        self, nested: tuple[nn.Module, StructuralDropout], *, anew: bool = True, heads: bool = True
    ) -> Accuracies:
        """The live model at all shares, its BatchNorm statistics measured anew or those of the training."""
        case, found = self.case, {}
        _, method = nested
        for share in case.shares:
            widths = case.widths(method.sites, share, heads)
            # the sandwich's statistics are of the full width; those of one random width a step are of none
            measured = anew and case.has_norms and not (share == 1 and method.options.sandwich)
            with method.at(widths, case.calibration if measured else None) as live:
                found[share] = case.test(live)
        return found

    def cut(self, *, fitted: bool, heads: bool = True) -> Accuracies:
        """The dense network cut without training: its largest channels, or squeezed; heads always go by magnitude."""
        case, dense = self.case, self.dense()
        sites = case.sites(dense)
        found = {1.0: case.test(dense)}
        for share in case.anchors:
            widths = case.widths(sites, share, heads)
            small = case.narrowed(dense, widths)
            if fitted:
                start = case.narrowed(dense, {s.name: widths[s.name] for s in sites if _is_heads(s)})
                maps = case.sites(start).select(lambda s: not _is_heads(s))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UniformWarning)  # of widths, not of stock classes
                    plan = squeeze(start, maps, case.calibration, f"params:{count_params(small)}", uniform=True)
                small = apply(start, plan, case.example)
            recalibrate(small, case.calibration)
            found[share] = case.test(small)
        return found

    def curve(self) -> list[dict[str, Any]]:
        """The points of `method.curve`, equal shares and widths searched site by site; test accuracies on its front."""
        case = self.case

        def work() -> list[dict[str, Any]]:
            _, method = self.nested("defaults")
            curve = method.curve(case.held_out, points=case.points, search=case.search, recalibrate=case.calibration)
            front = {id(point) for point in curve.front()}
            found = []
            for point in curve:
                found.append({**point.to_json(), "front": id(point) in front})
                if id(point) in front:
                    measured = case.calibration if case.has_norms and point is not curve.full else None
                    with method.at(point.widths, measured) as live:
                        found[-1]["test"] = case.test(live)
            return found

        points: list[dict[str, Any]] = self.kept("curve", work, DEFAULTS, case.points, case.search)
        return points

    def costs(self, rounds: int = 30) -> dict[str, float]:
        """CPU seconds of a training step, the methods taking turns on the same batches, and the ratio to dense."""
        found: dict[str, float] = self.kept("steps", lambda: step_costs(self.case, rounds), DEFAULTS, rounds)
        return found


def step_costs(case: Case, rounds: int) -> dict[str, float]:
    """CPU seconds of a training step: dense, as published, with our defaults; and the latter two over the first."""
    models = {name: case.model() for name in ("dense", "published", "defaults")}
    methods = {
        "published": StructuralDropout.as_published(models["published"], case.sites(models["published"])),
        "defaults": StructuralDropout(models["defaults"], case.sites(models["defaults"])),
    }
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for n, m in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for batch in _endless(case.batches, rounds):
        for name, model in models.items():
            model.train()
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=case.recipe.precision == "bf16"):
                value = _loss(model, methods.get(name), case.loss, batch)
            torch.autograd.backward(value)
            optimizers[name].step()
            optimizers[name].zero_grad()
            spent[name].append(time.process_time() - started)
    total = {name: sum(times[2:]) / (rounds - 2) for name, times in spent.items()}
    return {**total, **{f"{name} / dense": total[name] / total["dense"] for name in methods}}


def _loss(model: nn.Module, method: StructuralDropout | None, loss: Any, batch: Any) -> Tensor:
    if method is None:
        value: Tensor = loss(model, batch)
        return value
    method.before_step()
    return method.loss(lambda: loss(model, batch))


def _endless(batches: Any, count: int) -> Iterator[Any]:
    return islice((batch for _ in range(count) for batch in batches), count)


def _is_heads(site: Site) -> bool:
    return site.kind == "heads"


DEFAULTS = asdict(DropoutOptions())
"""Results of other defaults are other files."""


# ---------------------------------------------------------------------- the ways


@dataclass(frozen=True)
class Row:
    """One way to make a network narrower.

    Attributes:
        label: for people.
        accuracies: what it reaches.
        time: of the training, in that of the dense network; None where every width is trained for itself.
        ours: whether it depends on this project's defaults.
        wanted: of which networks.
    """

    label: str
    accuracies: Callable[[Bench], Accuracies]
    time: Callable[[Bench], float | None]
    ours: bool = False
    wanted: Callable[[Case], bool] = lambda _: True


ROWS: Mapping[str, Row] = {
    "separate": Row(
        "trained for itself",
        lambda b: {1.0: b.case.test(b.dense())} | {s: b.case.test(b.separate(s)) for s in b.case.anchors},
        lambda _: None,
    ),
    "magnitude": Row("dense, pruned by magnitude", lambda b: b.cut(fitted=False), lambda b: b.time(dense=1)),
    "squeeze": Row("dense, squeezed", lambda b: b.cut(fitted=True), lambda b: b.time(dense=1)),
    "squeeze, all heads": Row(
        "dense, squeezed, all heads kept",
        lambda b: b.cut(fitted=True, heads=False),
        lambda b: b.time(dense=1),
        wanted=lambda case: case.heads,
    ),
    "published": Row(
        "Structural Dropout, as published",
        lambda b: b.scored(b.nested("published", published=True)),
        lambda b: b.time(published=1),
    ),
    "defaults": Row(
        "Structural Dropout, our defaults", lambda b: b.scored(b.nested("defaults")), lambda b: b.time(ours=1), True
    ),
    "defaults, all heads": Row(
        "our defaults, all heads kept",
        lambda b: b.scored(b.nested("defaults"), heads=False),
        lambda b: b.time(ours=1),
        True,
        lambda case: case.heads,
    ),
    "short": Row(
        "our defaults, in the published rule's time",
        lambda b: b.scored(b.nested("short", b.epochs_in_published_time())),
        lambda b: b.time(ours=b.epochs_in_published_time() / b.case.recipe.epochs),
        True,
    ),
    "from dense": Row(
        "our defaults, from the dense network, half as many steps",
        lambda b: b.scored(b.nested("from-dense", b.half, dense=True)),
        lambda b: b.time(dense=1, ours=0.5),
        True,
    ),
    "as trained": Row(
        "our defaults, BatchNorm not measured anew",
        lambda b: b.scored(b.nested("defaults"), anew=False),
        lambda b: b.time(ours=1),
        True,
        lambda case: case.has_norms,
    ),
}
