"""Structural Dropout: one training, all widths.

The paper's MLP on the digits of scikit-learn, a VGG-like network on CIFAR-10, and a MiniLM classifier on SST-2 with its
feed-forward widths and attention heads (which squeezing does not choose). Every hidden width is cut to the same share,
by: networks of that width that are trained for themselves (the upper anchor), magnitude pruning and squeezing of the
dense network, Structural Dropout as it was published (one width a site and step, p = 0.5), and with this project's
defaults, for as many steps, for as much time as the published rule takes, and, where the network was trained from
scratch, started from the dense one.

The defaults were chosen on the digits in an earlier split (25 settings), whose rows the splits here share; the other
networks inherit them. Accuracies are of test sets, points of curves were chosen on held-out rows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import images, sst2
from benchmarks.record import markdown, stage, write_json
from shallower.matching import find_sites
from shallower.measuring import count_params
from shallower.methods.squeeze import squeeze
from shallower.methods.structural_dropout import StructuralDropout
from shallower.ordering import by_magnitude
from shallower.plan import Entry, Plan
from shallower.recalibration import recalibrate
from shallower.sites import Sites
from shallower.surgery import apply
from shallower.training import Recipe, train

SHARES = (0.75, 0.5, 0.25)
FINE = (1.0, 0.75, 0.5, 0.25, 0.125)
HELD_OUT = 1500
MLP_WIDTHS = (256, 192, 128, 77, 64, 32, 16, 8, 4, 2, 1)
"""Widths at which a network is trained for itself; 77 is 30 %."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "our defaults": {},
    "no sandwich, no teacher": {"sandwich": False, "distillation": 0.0},
    "no teacher": {"distillation": 0.0},
    "half of the loss by the teacher": {"distillation": 0.5},
    "not sorted": {"sort": None},
    "no n / k": {"rescale": False},
    "one share for all sites": {"shared": True},
    "two random passes": {"passes": 2},
    "no random pass": {"passes": 0},
    "p = 0.5 in the random pass": {"p": 0.5},
    "from 1 channel on": {"lower_bound": 1},
    "steps of 16 channels": {"step": 16},
}
Method = Callable[[nn.Module, Sites], StructuralDropout]


@dataclass
class Case:
    """One network and its data.

    Attributes:
        title: for people.
        make: the dense network before training, from a seed.
        batches, loss, recipe: how it trains.
        held_out, test: share of rows classified rightly.
        calibration: inputs, for squeezing and for BatchNorm statistics.
        example: inputs to find the sites with.
        heads: whether attention heads are narrowed, too.
        search: widths at which `curve` tries each site alone; 0 leaves the curve out.
        pretrained: `make` gives trained weights, of which narrower networks take the largest.
        anew: whether narrower networks draw their initial weights anew, for their own fan-in.
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
    heads: bool = False
    search: int = 2
    pretrained: bool = False
    anew: bool = True

    def sites(self, model: nn.Module) -> Sites:
        """All that squeezing can narrow, and heads; not the convolution whose average over pixels is classified."""
        found = find_sites(model.eval(), self.example, heads=self.heads)
        return found.select(lambda s: not s.not_narrow and len({m.kind for m in s.maps}) == 1)

    def widths(self, sites: Sites, share: float) -> dict[str, int]:
        """The same share of every site's channels."""
        return {site.name: max(1, round(share * site.width)) for site in sites}

    def narrowed(self, model: nn.Module, share: float, *, largest: bool) -> nn.Module:
        """A network with that share of the channels, the largest ones or the first."""
        sites = self.sites(model)
        if share == 1:
            return copy.deepcopy(model)
        orders = by_magnitude(model, sites)
        entries = []
        for site in sites:
            k = self.widths(sites, share)[site.name]
            entries.append(Entry.narrow(site, orders[site.name][:k] if largest else torch.arange(k)))
        return apply(model, Plan(tuple(entries)), self.example)


class Bench:
    """Trainings of one case, each done once."""

    def __init__(self, case: Case, cache: Path, seed: int = 0) -> None:
        self.case, self.cache, self.seed = case, cache, seed
        self.recipe = dataclasses.replace(case.recipe, seed=seed)

    def trained(
        self, name: str, model: nn.Module, method: StructuralDropout | None = None, epochs: int = 0
    ) -> nn.Module:
        """`model`, trained; for other than the recipe's epochs where given."""
        recipe = dataclasses.replace(self.recipe, epochs=epochs or self.recipe.epochs)
        path = stage(self.cache, name, recipe)
        label = f"{self.case.title}, {name}"
        train(model, self.case.batches, self.case.loss, recipe, method=method, checkpoint=path, label=label)
        return model.eval()

    def dense(self) -> nn.Module:
        return self.trained("dense", self.case.make(self.seed))

    def separate(self, share: float) -> float:
        """Test accuracy of a network of that width trained for itself."""
        case = self.case
        small = case.narrowed(case.make(self.seed), share, largest=case.pretrained)
        if case.anew and not case.pretrained:
            torch.manual_seed(self.seed)
            for module in small.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        return case.test(self.trained(f"separate-{share:.4f}", small))

    def nested(
        self, name: str, make: Method, epochs: int = 0, start: nn.Module | None = None
    ) -> tuple[nn.Module, StructuralDropout]:
        """A network trained at all widths, from scratch or from trained weights."""
        model = self.case.make(self.seed) if start is None else start
        method = make(model, self.case.sites(model))
        return self.trained(f"{name}-{method.distillation:g}", model, method, epochs), method

    def accuracies(
        self, model: nn.Module, method: StructuralDropout, shares: Sequence[float], anew: bool = True
    ) -> list[float]:
        """Test accuracies of the live model, with BatchNorm statistics measured anew or those of the training."""
        found = []
        norms = anew and any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        for share in shares:
            widths = self.case.widths(method.sites, share)
            # the sandwich's statistics are of the full width; those of one random width a step are of none
            trained = share == 1 and method.sandwich
            with method.at(widths, self.case.calibration if norms and not trained else None) as live:
                found.append(self.case.test(live))
        return found

    def scored(self, name: str, make: Method, epochs: int = 0, start: nn.Module | None = None) -> list[float]:
        """Test accuracies of a network trained at all widths."""
        return self.accuracies(*self.nested(name, make, epochs, start), FINE)

    def ours(self, search: int, quick: bool) -> dict[str, Any]:
        """The same with our defaults, without BatchNorm measured anew, and at widths searched site by site."""
        case = self.case
        model, method = self.nested("defaults", StructuralDropout)
        rows = {"defaults": self.accuracies(model, method, FINE)}
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            rows["defaults, BatchNorm as trained"] = self.accuracies(model, method, FINE, anew=False)
        searched = []
        if search:
            curve = method.curve(case.held_out, points=4 if quick else 6, search=search, recalibrate=case.calibration)
            for point in curve.front():
                with method.at(point.widths, None if point is curve.full else case.calibration) as live:
                    searched.append({**point.to_json(), "test": case.test(live)})
        return {"rows": rows, "searched": searched}

    def pruned(self, dense: nn.Module) -> dict[str, list[float]]:
        """Test accuracies of the dense network cut without training: by magnitude, and by squeezing."""
        case = self.case
        found: dict[str, list[float]] = {
            name: [] for name in (("magnitude",) if case.heads else ("magnitude", "squeeze"))
        }
        for share in SHARES:
            small = case.narrowed(dense, share, largest=True)
            recalibrate(small, case.calibration)
            found["magnitude"].append(case.test(small))
            if case.heads:  # squeezing does not choose heads
                continue
            plan = squeeze(dense, case.sites(dense), case.calibration, f"params:{count_params(small)}", uniform=True)
            small = apply(dense, plan, case.example)
            recalibrate(small, case.calibration)
            found["squeeze"].append(case.test(small))
        return found

    def step_costs(self, rounds: int = 40) -> dict[str, float]:
        """CPU seconds of a training step, the methods taking turns, and the ratio to the dense network's."""
        models = {"dense": self.case.make(0), "published": self.case.make(0), "defaults": self.case.make(0)}
        methods = {
            "published": StructuralDropout.as_published(models["published"], self.case.sites(models["published"])),
            "defaults": StructuralDropout(models["defaults"], self.case.sites(models["defaults"])),
        }
        optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for n, m in models.items()}
        batches = iter(self.case.batches)
        spent: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            batch = next(batches, None)
            if batch is None:
                batches = iter(self.case.batches)
                batch = next(batches)
            for name, model in models.items():
                model.train()
                started = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=self.case.recipe.precision == "bf16"):
                    value = step(model, methods.get(name), self.case.loss, batch)
                torch.autograd.backward(value)
                optimizers[name].step()
                optimizers[name].zero_grad()
                spent[name].append(time.process_time() - started)
        total = {name: sum(times[2:]) / (rounds - 2) for name, times in spent.items()}
        return {**total, **{f"{name} / dense": total[name] / total["dense"] for name in methods}}


def step(model: nn.Module, method: StructuralDropout | None, loss: Any, batch: Any) -> Tensor:
    """The loss of one step, with or without a method."""
    if method is None:
        value: Tensor = loss(model, batch)
        return value
    method.before_step()
    return method.loss(lambda: loss(model, batch))


def measured(case: Case, cache: Path, quick: bool) -> dict[str, Any]:
    """All ways to narrow one network; each is kept in a file, so that it is done once."""
    bench = Bench(case, cache)
    settings = stage(cache, "", case.title, case.recipe, len(case.batches), quick).stem

    def kept(name: str, work: Callable[[], Any]) -> Any:
        return once(cache / f"{name}{settings}.json", lambda: {"found": work()})["found"]

    costs = kept("steps", lambda: bench.step_costs(6 if quick else 30))
    rows: dict[str, list[float]] = {
        "trained for itself": kept("separate", lambda: [bench.separate(share) for share in SHARES]),
        "published": kept("published", lambda: bench.scored("published", StructuralDropout.as_published)),
    }
    ours = kept("ours", lambda: bench.ours(case.search, quick))
    rows |= ours["rows"]
    epochs = max(1, round(case.recipe.epochs * costs["published / dense"] / costs["defaults / dense"]))
    if epochs < case.recipe.epochs or quick:
        rows[ROWS_SHORT] = kept("short", lambda: bench.scored("defaults-short", StructuralDropout, epochs))
    if not case.pretrained:
        half = max(1, case.recipe.epochs // 2)
        rows[ROWS_CONTINUED] = kept(
            "continued", lambda: bench.scored("continued", StructuralDropout, half, bench.dense())
        )
    rows |= kept("pruned", lambda: bench.pruned(bench.dense()))
    shares = (1.0, *SHARES)
    return {
        "title": case.title,
        "recipe": dataclasses.asdict(case.recipe),
        "batches": len(case.batches),
        "dense": kept("dense", lambda: case.test(bench.dense())),
        "short epochs": epochs,
        "params": {str(s): count_params(case.narrowed(case.make(0), s, largest=True)) for s in shares},
        "rows": rows,
        "steps": costs,
        "searched": ours["searched"],
    }


def once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, from the file where it is there."""
    if not path.exists():
        write_json(path, work())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---------------------------------------------------------------------- the paper's MLP


class Rows:
    """Batches of (inputs, labels) in a new order each epoch."""

    def __init__(self, inputs: Tensor, labels: Tensor, size: int) -> None:
        self.inputs, self.labels, self.size = inputs, labels, size

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels))
        for rows in order[: len(self) * self.size].view(len(self), self.size):
            yield self.inputs[rows], self.labels[rows]


def mlp(inputs: int, width: int, seed: int) -> nn.Sequential:
    """inputs - width - width - 10, as in the paper."""
    torch.manual_seed(seed)
    maps = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 10)
    return nn.Sequential(maps[0], nn.ReLU(), maps[1], nn.ReLU(), maps[2])


def digits(seed: int, quick: bool) -> Case:
    """The MLP on scikit-learn's 1,797 digits of 8x8: 900 to train on, 300 held out, 597 to test; split by the seed."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(100 + seed))
    x, y = pixels[order].float() / 16, labels[order].long()

    def share_right(rows: slice) -> Callable[[nn.Module], float]:
        @torch.no_grad()
        def score(model: nn.Module) -> float:
            return float((model(x[rows]).argmax(1) == y[rows]).float().mean())

        return score

    return Case(
        title="MLP 64-256-256-10, digits",
        make=lambda seed: mlp(64, 256, seed),
        batches=Rows(x[:900], y[:900], 50),
        loss=images.cross_entropy,
        recipe=Recipe(epochs=2 if quick else 60, lr=1e-3, weight_decay=0.01, clip=None),
        held_out=share_right(slice(900, 1200)),
        test=share_right(slice(1200, None)),
        calibration=list(torch.split(x[:900], 50)),
        example=x[:2],
    )


def mlp_results(cache: Path, quick: bool) -> dict[str, Any]:
    """The paper's figure over several seeds, each with its own split, and the options one by one."""
    seeds = 1 if quick else 5
    path = stage(cache, "results", "mlp", digits(0, quick).recipe, seeds, OPTIONS).with_suffix(".json")
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    every = (256, 128, 1) if quick else tuple(range(256, 0, -1))
    separate = MLP_WIDTHS[:3] if quick else MLP_WIDTHS
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        bench = Bench(digits(seed, quick), cache / f"seed-{seed}", seed)
        dense = bench.dense()
        published, method = bench.nested("published", StructuralDropout.as_published)
        run: dict[str, Any] = {
            "dense": bench.case.test(dense),
            "separate": [bench.case.test(dense) if k == 256 else bench.separate(k / 256) for k in separate],
            "pruned": bench.pruned(dense),
            "published": bench.accuracies(published, method, [k / 256 for k in every]),
            "options": {},
        }
        for name, options in OPTIONS.items():
            chosen = dict(options)

            def ours(model: nn.Module, sites: Sites, chosen: Any = chosen, seed: int = seed) -> StructuralDropout:
                return StructuralDropout(model, sites, seed=seed, **chosen)

            model, method = bench.nested(name.replace(" ", "-").replace("/", ""), ours)
            shares = [k / 256 for k in (every if name in ("our defaults", "from 1 channel on") else separate)]
            held_out = []
            for k in separate:
                with method.at(k) as live:
                    held_out.append(bench.case.held_out(live))
            run["options"][name] = {"test": bench.accuracies(model, method, shares), "held out": held_out}
        runs.append(run)
    bench = Bench(digits(0, quick), cache / "seed-0")
    large = dataclasses.replace(
        bench.case,
        make=lambda seed: mlp(784, 1024, seed),
        batches=[(torch.randn(128, 784), torch.randint(0, 10, (128,))) for _ in range(4)],
        example=torch.randn(2, 784),
    )
    paper = dataclasses.replace(large, make=lambda seed: mlp(784, 256, seed))
    rounds = 6 if quick else 200
    found = {
        "runs": runs,
        "separate widths": separate,
        "every width": every,
        "steps": {
            "784-256-256-10, batch 128": Bench(paper, cache).step_costs(rounds),
            "784-1024-1024-10, batch 128": Bench(large, cache).step_costs(rounds),
        },
    }
    write_json(path, found)
    return found


def summarised(mlp: Mapping[str, Any]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, by width."""
    runs, every, separate = mlp["runs"], mlp["every width"], mlp["separate widths"]
    cut = [round(share * 256) for share in SHARES]

    def over_seeds(widths: Sequence[int], found: Sequence[Sequence[float]]) -> dict[str, Any]:
        values = torch.tensor(found, dtype=torch.float64)
        spread = values.std(0) if len(runs) > 1 else torch.zeros(len(widths))
        return {"widths": list(widths), "mean": _rounded(values.mean(0)), "spread": _rounded(spread)}

    rows = {
        "trained for itself": over_seeds(separate, [r["separate"] for r in runs]),
        "magnitude": over_seeds(cut, [r["pruned"]["magnitude"] for r in runs]),
        "squeeze": over_seeds(cut, [r["pruned"]["squeeze"] for r in runs]),
        "published": over_seeds(every, [r["published"] for r in runs]),
    }
    narrow = [i for i, k in enumerate(separate) if k >= 32]
    held_out = {}
    for name in runs[0]["options"]:
        own = [run["options"][name] for run in runs]
        widths = every if len(own[0]["test"]) == len(every) else separate
        rows[name] = over_seeds(widths, [o["test"] for o in own])
        held_out[name] = round(sum(o["held out"][i] for o in own for i in narrow) / len(own) / len(narrow), 5)
    return {"seeds": len(runs), "shown": separate, "rows": rows, "held out": held_out, "steps": mlp["steps"]}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


# ---------------------------------------------------------------------- CIFAR-10 and SST-2


def vgg_like(seed: int, quick: bool) -> nn.Module:
    """3x3 convolutions with BatchNorm in a row; strides in the place of pooling, so that every width is a site."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for wide, stride in ((8, 2), (8, 2)) if quick else ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2)):
        layers += [nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def cifar(title: str, make: Callable[[int], nn.Module], recipe: Recipe, data: Path, quick: bool, cache: Path) -> Case:
    """A network on CIFAR-10: 13,500 rows to train on, 1,500 held out, 10,000 to test."""
    rows, test = images.cifar10(data, "train", cache), images.cifar10(data, "test", cache)
    held_out = rows[:100] if quick else rows[:HELD_OUT]
    test = test[:200] if quick else test
    trained = rows[HELD_OUT : HELD_OUT + 256] if quick else rows[HELD_OUT:]
    calibration = torch.split(images.normalised(trained[:1024].pixels), 128)
    return Case(
        title=title,
        make=make,
        batches=images.Batches(trained, 128),
        loss=images.cross_entropy,
        recipe=dataclasses.replace(recipe, epochs=1) if quick else recipe,
        held_out=lambda model: images.accuracy(model, held_out),
        test=lambda model: images.accuracy(model, test),
        calibration=list(calibration),
        example=images.normalised(test.pixels[:4]),
    )


def minilm(data: Path, quick: bool, cache: Path) -> Case:
    """MiniLM fine-tuned on a part of SST-2, its feed-forward widths and heads nested."""
    trained = sst2.sentences(data, "train", 96 if quick else 3200, cache=cache)
    held_out = sst2.sentences(data, "validation", 64 if quick else None, cache=cache)
    test = sst2.sentences(data, "test", 64 if quick else None, cache=cache)
    inputs = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in trained.in_batches(32)]
    ids = torch.randint(1000, 20_000, (2, 16), generator=torch.Generator().manual_seed(0))
    return Case(
        title="MiniLM, SST-2",
        make=sst2.network,
        batches=sst2.Batches(trained, 32),
        loss=sst2.cross_entropy,
        recipe=Recipe(epochs=1, lr=6e-5, warmup=0.1, precision="bf16"),
        held_out=lambda model: sst2.accuracy(model, held_out),
        test=lambda model: sst2.accuracy(model, test),
        calibration=inputs[:: max(1, len(inputs) // 24)],
        example={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        heads=True,
        search=0,
        pretrained=True,
    )


VGG = Recipe(epochs=8, lr=2e-3, weight_decay=0.05, warmup=0.1, precision="bf16")


def cases(data: Path, quick: bool, cache: Path) -> dict[str, Callable[[], Case]]:
    """The larger networks, by the name of their folder."""
    return {
        "vgg": lambda: cifar("VGG-like, CIFAR-10", lambda s: vgg_like(s, quick), VGG, data, quick, cache),
        "minilm": lambda: minilm(data, quick, cache),
    }


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:
    """Train and narrow all networks."""
    found: dict[str, Any] = {"mlp": summarised(mlp_results(cache / "mlp", quick))}
    for name, case in cases(data, quick, cache.parent).items():
        found[name] = measured(case(), cache / name, quick)
    return found


# ---------------------------------------------------------------------- tables and plots

ROWS_SHORT = "defaults, in the published rule's time"
ROWS_CONTINUED = "defaults, from the dense network"
ROWS = {
    "trained for itself": "trained for itself",
    "magnitude": "dense, pruned by magnitude",
    "squeeze": "dense, squeezed",
    "published": "Structural Dropout, as published",
    "defaults": "Structural Dropout, our defaults",
    ROWS_SHORT: "our defaults, in the published rule's time",
    ROWS_CONTINUED: "our defaults, from the dense network, half as many steps",
    "defaults, BatchNorm as trained": "our defaults, BatchNorm not measured anew",
}


MLP_ROWS = {
    **dict(list(ROWS.items())[:4]),
    "our defaults": "Structural Dropout, our defaults",
    "from 1 channel on": "our defaults, from 1 channel on",
}


def table(results: dict[str, Any]) -> str:
    """Accuracies by width, one table a network; the options; what a step costs."""
    parts = [_mlp_table(results["mlp"])]
    parts += [_case_table(name, results[name]) for name in ("vgg", "minilm") if name in results]
    return "\n\n".join([*parts, _steps_table(results)])


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mlp_table(mlp: Mapping[str, Any]) -> str:
    shown = [k for k in mlp["shown"] if k >= 8]
    lines, options = [], []
    for name, row in mlp["rows"].items():
        at = dict(zip(row["widths"], zip(row["mean"], row["spread"], strict=True), strict=True))
        if name in MLP_ROWS:
            cells = [f"{at[k][0]:.1%} ± {100 * at[k][1]:.1f}" if k in at else "" for k in shown]
            lines.append([MLP_ROWS[name], *cells])
        if name in mlp["held out"]:
            options.append(
                [name, _percent(mlp["held out"][name]), *[_percent(at[k][0]) if k in at else "" for k in shown]]
            )
    return (
        f"### The MLP on digits\n\n![accuracy by width](results/structural_dropout-mlp.png)\n\n"
        f"{markdown(['channels of 256', *map(str, shown)], lines)}\n\n"
        f"Means and standard deviations over {mlp['seeds']} seeds, each with its own split; 77 channels are 30 %. The "
        "options, each changed alone: the held-out accuracy by which they were judged, the mean over widths from 32, "
        "and test accuracies:\n\n"
        f"{markdown(['option', 'held out', *map(str, shown)], options)}"
    )


def _case_table(name: str, case: Mapping[str, Any]) -> str:
    shares = [1.0, *SHARES]
    lines = []
    for row in ROWS:
        if row not in case["rows"]:
            continue
        values = case["rows"][row]
        at = dict(zip(SHARES if len(values) == len(SHARES) else FINE, values, strict=True))
        if len(values) == len(SHARES):
            at[1.0] = case["dense"]
        lines.append([ROWS[row], *[_percent(at[share]) for share in shares]])
    header = ["share of every hidden width", *[f"{share:.0%}" for share in shares]]
    params = ", ".join(f"{case['params'][str(share)]:,}" for share in shares)
    searched = [
        [p["label"], f"{p['params']:,}", f"{p['macs']:,}", _percent(p["score"]), _percent(p["test"])]
        for p in case["searched"]
    ]
    text = f"Parameters: {params}."
    if ROWS_SHORT in case["rows"]:
        epochs = f"{case['short epochs']} of {case['recipe']['epochs']}"
        text += f" In the published rule's time our defaults had {epochs} epochs."
    if searched:
        text += (
            " The front of `method.curve`, equal widths and widths searched site by site on held-out rows:\n\n"
            f"{markdown(['point', 'params', 'MACs', 'held out', 'test'], searched)}"
        )
    return (
        f"### {case['title']}\n\n![accuracy by width](results/structural_dropout-{name}.png)\n\n"
        f"{markdown(header, lines)}\n\n{text}"
    )


def _steps_table(results: Mapping[str, Any]) -> str:
    steps = {f"MLP {name}": costs for name, costs in results["mlp"]["steps"].items()}
    steps |= {results[n]["title"]: results[n]["steps"] for n in ("vgg", "minilm") if n in results}
    lines = [
        [
            name,
            f"{costs['dense'] * 1e3:.1f} ms",
            f"{costs['published / dense']:.2f}x",
            f"{costs['defaults / dense']:.2f}x",
        ]
        for name, costs in steps.items()
    ]
    return (
        "### What a training step costs\n\n"
        f"{markdown(['network', 'dense', 'as published', 'our defaults'], lines)}\n\n"
        "CPU time of forward, backward and AdamW's step; the three take turns on the same batches."
    )


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write one plot a network into `folder`; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = results["mlp"]["rows"]
    lines = {label: ([k / 256 for k in rows[name]["widths"]], rows[name]["mean"]) for name, label in MLP_ROWS.items()}
    plots = {"mlp": lines}
    for name in ("vgg", "minilm"):
        if name in results:
            rows = results[name]["rows"]
            plots[name] = {
                ROWS[row]: (list(SHARES if len(values) == len(SHARES) else FINE), values)
                for row, values in rows.items()
                if row in ROWS
            }
    for name, drawn in plots.items():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for label, (shares, values) in drawn.items():
            dotted = len(shares) > 12
            axes.plot([100 * s for s in shares], [100 * v for v in values], "-" if dotted else "o-", label=label, ms=4)
        axes.set_xlabel("channels kept at every site, %")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(results[name]["title"] if name != "mlp" else "MLP 64-256-256-10, digits")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"structural_dropout-{name}.png", dpi=110, metadata={"Software": None})
