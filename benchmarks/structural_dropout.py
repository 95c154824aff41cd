"""Structural Dropout: one training, all widths.

The paper's MLP on the digits of scikit-learn, a VGG-like network and a small ViT on CIFAR-10, and a MiniLM classifier
on SST-2. Every hidden width is cut to the same share, attention heads too, by: networks of that width that are trained
for themselves (the upper anchor), magnitude pruning and squeezing of the dense network (heads, which squeezing did not
choose yet, go by magnitude), Structural Dropout as it was published (one width a site and step, p = 0.5), and with this
project's defaults: for as many steps, for as much time as the published rule takes, and from the dense network with
half as many steps, which takes about as long in all as as many steps from the start. Trainings are short, for a CPU:
longer ones would lift all rows, and a part of what is gained from the dense network is that it was trained for longer.

Squeezing needs no training and is the first thing to try: it is best on the MLP and on MiniLM. Structural Dropout gives
all widths at once, heads too, and is best on the VGG and on the ViT, where heads cut by magnitude undo what squeezing
saves; it is to be started from a trained network. What pays at equal time and at equal steps is in the first table.

The defaults were chosen by held-out rows: on a VGG-like network with images of 16x16 pixels (12 settings), the digits
(16, after 25 in another split, whose rows the splits here share) and MiniLM with 1,600 sentences (3). The ViT inherits
them. Accuracies are of test sets; points of curves were chosen on held-out rows. The squeezed rows of the ViT are
of an earlier version of squeezing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import images, sst2, vit
from benchmarks.narrowing import DEFAULTS, QUARTERS, ROWS, Accuracies, Bench, Case, Part
from benchmarks.record import markdown
from shallower.training import Recipe

HELD_OUT = 1500
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "no sandwich, no teacher": {"sandwich": False, "distillation": 0.0},
    "no teacher": {"distillation": 0.0},
    "the teacher alone": {"distillation": 1.0},
    "not sorted": {"sort": None},
    "not scaled": {"rescale": 0.0},
    "scaled by n / k": {"rescale": 1.0},
}
"""What is changed, alone, on the digits."""


# ---------------------------------------------------------------------- the networks


def digits(seed: int, quick: bool) -> Case:
    """The paper's MLP on scikit-learn's 1,797 digits of 8x8: 900 to train on, 300 held out, 597 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(100 + seed))
    x, y = pixels[order].float() / 16, labels[order].long()
    widths = (192, 128, 1) if quick else (192, 128, 77, 64, 32, 16, 8)
    return Case(
        title="MLP 64-256-256-10, digits",
        make=lambda seed: mlp(64, 256, seed),
        batches=Rows(x[:900], y[:900], 50),
        loss=images.cross_entropy,
        recipe=Recipe(epochs=2 if quick else 60, lr=1e-3, weight_decay=0.01, clip=None, seed=seed),
        held_out=lambda model: share_right(model, x[900:1200], y[900:1200]),
        test=lambda model: share_right(model, x[1200:], y[1200:]),
        calibration=list(torch.split(x[:900], 50)),
        example=x[:2],
        anchors=[k / 256 for k in widths],
        shares=[1.0, *[k / 256 for k in widths]] if quick else [k / 256 for k in range(256, 0, -1)],
        points=2 if quick else 8,
    )


def on_cifar(
    title: str, make: Callable[[int], nn.Module], recipe: Recipe, batch: int, data: Path, quick: bool, cache: Path
) -> Case:
    """A network on CIFAR-10: 13,500 rows to train on, 1,500 held out, 10,000 to test."""
    rows, test = images.cifar10(data, "train", cache), images.cifar10(data, "test", cache)
    held_out = rows[:100] if quick else rows[:HELD_OUT]
    test = test[:200] if quick else test
    trained = rows[HELD_OUT : HELD_OUT + 256] if quick else rows[HELD_OUT:]
    return Case(
        title=title,
        make=make,
        batches=images.Batches(trained, batch),
        loss=images.cross_entropy,
        recipe=replace(recipe, epochs=1) if quick else recipe,
        held_out=lambda model: images.accuracy(model, held_out),
        test=lambda model: images.accuracy(model, test),
        calibration=list(torch.split(images.normalised(trained[:1024].pixels), 128)),
        example=images.normalised(test.pixels[:4]),
        anchors=(0.5,) if quick else QUARTERS,
        points=2 if quick else 6,
    )


def vgg(data: Path, quick: bool, cache: Path) -> Case:
    """Five 3x3 convolutions with BatchNorm."""
    recipe = Recipe(epochs=8, lr=2e-3, weight_decay=0.05, warmup=0.1, precision="bf16")
    return on_cifar("VGG-like, CIFAR-10", lambda seed: vgg_like(seed, quick), recipe, 128, data, quick, cache)


def small_vit(data: Path, quick: bool, cache: Path) -> Case:
    """Three blocks of width 96 with four heads, on patches of 8."""
    recipe = Recipe(epochs=6, lr=1.5e-3, weight_decay=0.05, warmup=0.1)
    layers = 1 if quick else 3

    def make(seed: int) -> nn.Module:
        return vit.network(layers, seed, patch=8, heads=4)

    case = on_cifar("ViT, CIFAR-10", make, recipe, vit.BATCH, data, quick, cache)
    return replace(case, heads=True, start="first")


def minilm(data: Path, quick: bool, cache: Path) -> Case:
    """The sentence encoder, fine-tuned on SST-2: every epoch is 20 batches of 12,000 sentences."""
    trained = sst2.sentences(data, "train", 96 if quick else sst2.SENTENCES, cache=cache)
    held_out = sst2.sentences(data, "validation", 64 if quick else None, cache=cache)
    test = sst2.sentences(data, "test", 64 if quick else None, cache=cache)
    inputs = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in trained.in_batches(32)]

    def make(seed: int) -> nn.Module:
        model = sst2.network(seed)
        if quick:
            del model.encoder.encoder.layer[1:]  # type: ignore[union-attr,operator]
        return model

    ids = torch.randint(1000, 20_000, (2, 16), generator=torch.Generator().manual_seed(0))
    return Case(
        title="MiniLM, SST-2",
        make=make,
        batches=Part(sst2.Batches(trained, 32), 20),
        loss=sst2.cross_entropy,
        recipe=Recipe(epochs=1 if quick else 10, lr=6e-5, warmup=0.1, precision="bf16"),
        held_out=lambda model: sst2.accuracy(model, held_out),
        test=lambda model: sst2.accuracy(model, test),
        calibration=inputs[:: max(1, len(inputs) // 12)],
        example={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        anchors=(0.5,) if quick else QUARTERS,
        heads=True,
        start="largest",
        search=1,
        points=2 if quick else 5,
    )


def mlp(inputs: int, width: int, seed: int) -> nn.Sequential:
    """inputs - width - width - 10, as in the paper."""
    torch.manual_seed(seed)
    maps = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 10)
    return nn.Sequential(maps[0], nn.ReLU(), maps[1], nn.ReLU(), maps[2])


def vgg_like(seed: int, quick: bool) -> nn.Module:
    """3x3 convolutions with BatchNorm in a row; strides in the place of pooling, so that every width is a site."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for wide, stride in ((8, 2), (8, 2)) if quick else ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2)):
        layers += [nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


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


@torch.no_grad()
def share_right(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of the rows that are classified rightly."""
    return float((model(inputs).argmax(1) == labels).float().mean())


# ---------------------------------------------------------------------- the measurements


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:
    """Train and narrow all networks; digits with several seeds, each with its own split."""
    makers: dict[str, Callable[[], list[Case]]] = {
        "mlp": lambda: [digits(seed, quick) for seed in range(2 if quick else 5)],
        "vgg": lambda: [vgg(data, quick, cache.parent)],
        "vit": lambda: [small_vit(data, quick, cache.parent)],
        "minilm": lambda: [minilm(data, quick, cache.parent)],
    }
    networks = {}
    for name, make in makers.items():
        benches = [Bench(case, cache / name) for case in make()]
        networks[name] = measured(benches)
        if name == "mlp":
            networks[name]["options"] = {option: changed(benches, option) for option in ("", *OPTIONS)}
    return {"networks": networks, "paper_mlps": papers_costs(Bench(digits(0, quick), cache / "mlp"), quick)}


def measured(benches: Sequence[Bench]) -> dict[str, Any]:
    """All ways to narrow one network, over one case for each seed."""
    first = benches[0]
    case = first.case
    rows = {
        name: {**over_seeds([bench.accuracies(name) for bench in benches]), "time": row.time(first)}
        for name, row in ROWS.items()
        if row.wanted(case)
    }
    return {
        "title": case.title,
        "seeds": len(benches),
        "recipe": vars(case.recipe),
        "steps": len(case.batches) * case.recipe.epochs,
        "params": [[share, case.params(share)] for share in (1.0, *case.anchors)],
        "costs": first.costs(),
        "rows": rows,
        "curve": first.curve(),
    }


def changed(benches: Sequence[Bench], option: str) -> dict[str, Any]:
    """What one option makes of the defaults: held-out and test accuracies at the shares of the anchors."""
    options = OPTIONS.get(option, {})
    name = f"option-{option}".replace(" ", "-").replace("/", "").strip("-")

    def work(bench: Bench) -> list[tuple[float, float, float]]:
        case, found = bench.case, []
        _, method = bench.nested(name, **options) if options else bench.nested("defaults")
        for share in (1.0, *case.anchors):
            with method.at(case.widths(method.sites, share)) as live:
                found.append((share, case.held_out(live), case.test(live)))
        return found

    each = [bench.kept(name, partial(work, bench), DEFAULTS, options) for bench in benches]
    return {
        "held out": over_seeds([{share: held_out for share, held_out, _ in one} for one in each]),
        "test": over_seeds([{share: test for share, _, test in one} for one in each]),
    }


def papers_costs(bench: Bench, quick: bool) -> dict[str, dict[str, float]]:
    """What a step costs on MLPs of MNIST's 784 inputs, in batches of 128, by their hidden width."""
    noise = [(torch.randn(128, 784), torch.randint(0, 10, (128,))) for _ in range(4)]
    found = {}
    for width in (256, 1024):
        case = replace(
            bench.case,
            title=f"MLP 784-{width}-{width}-10, batch 128",
            make=partial(mlp, 784, width),
            batches=noise,
            example=noise[0][0][:2],
        )
        found[case.title] = Bench(case, bench.cache).costs(6 if quick else 200)
    return found


def over_seeds(found: Sequence[Accuracies]) -> dict[str, list[float]]:
    """Mean and standard deviation at every share; of one seed, no deviation."""
    values = torch.tensor([list(one.values()) for one in found], dtype=torch.float64)
    spread = {"spread": _rounded(values.std(0))} if len(found) > 1 else {}
    return {"shares": list(found[0]), "mean": _rounded(values.mean(0)), **spread}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


# ---------------------------------------------------------------------- tables

HALF = 0.5
ALLOWED = 0.005
"""Of accuracy, below a network that was trained for half the width."""
COMPARED = ("published", "short", "defaults", "from dense", "squeeze")


def table(results: dict[str, Any]) -> str:
    """What was asked for, one table a network, and what a step costs."""
    networks = results["networks"]
    parts = [_aims(results), *[_network(name, found) for name, found in networks.items()], _costs(results)]
    return "\n\n".join(parts)


def accuracy_at(row: Mapping[str, Any], share: float) -> float | None:
    """The mean accuracy of a row at a share of the channels; None where it was not measured."""
    at: dict[float, float] = dict(zip(row["shares"], row["mean"], strict=True))
    return at.get(share)


def best_at(rows: Mapping[str, Any], share: float) -> str:
    """The row that does best at a share of the channels, of those that make all widths of one network."""
    alike = [key for key in rows if key != "separate" and not key.endswith("all heads")]
    return max(alike, key=lambda key: accuracy_at(rows[key], share) or 0.0)


def _against(goal: float, value: float | None) -> str:
    if value is None:
        return ""
    reached = "reached" if value >= goal - ALLOWED else "missed"
    return f"{value:.2%} ({100 * (value - goal):+.2f}), {reached}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _aims(results: Mapping[str, Any]) -> str:
    lines = []
    for found in results["networks"].values():
        rows = found["rows"]
        goal = accuracy_at(rows["separate"], HALF) or 0.0
        values = [accuracy_at(rows[name], HALF) if name in rows else None for name in COMPARED]
        lines.append([found["title"], _percent(goal), *[_against(goal, value) for value in values]])
    header = ["half of every width", "trained for itself", *[ROWS[name].label for name in COMPARED]]
    mlp = results["networks"]["mlp"]["rows"]["defaults"]
    full, narrow = accuracy_at(mlp, 1.0) or 0.0, accuracy_at(mlp, 77 / 256)
    text = (
        f"Asked for: half of the width at most {100 * ALLOWED:.1f} points below a network trained for that width.\n\n"
    )
    text += markdown(header, lines)
    if narrow is not None:
        reached = "reached" if narrow >= full - 0.01 else "missed"
        text += (
            f"\n\nAsked for: 70 % of the MLP's hidden features removed within 1 point of all. With 77 of 256 channels "
            f"our defaults have {narrow:.2%}, with all {full:.2%}: {reached}."
        )
    best = [
        [found["title"], *[ROWS[best_at(found["rows"], share)].label for share in QUARTERS]]
        for found in results["networks"].values()
        if "squeeze" in found["rows"]
    ]
    text += "\n\nWhat does best at the same widths, of the ways that make all of them from one network:\n\n" + markdown(
        ["channels kept", *[f"{share:.0%}" for share in QUARTERS]], best
    )
    title, costs = list(results["paper_mlps"].items())[-1]
    ratio = costs["published / dense"]
    return (
        f"### What was asked for\n\n{text}\n\nAsked for: a step by the published rule costs at most 0.9 of a dense one "
        f"where MLPs dominate. {title}: {ratio:.2f}, {'reached' if ratio <= 0.9 else 'missed'}."
    )


def _network(name: str, found: Mapping[str, Any]) -> str:
    shares = [share for share, _ in found["params"]]
    best = {share: best_at(found["rows"], share) for share in shares}
    lines = []
    for key, row in found["rows"].items():
        spread = dict(zip(row["shares"], row.get("spread", []), strict=False))
        cells = []
        for share in shares:
            value = accuracy_at(row, share)
            text = "" if value is None else f"{value:.2%}" + (f" ± {100 * spread[share]:.1f}" if spread else "")
            cells.append(f"**{text}**" if key == best[share] and share < 1 else text)
        time = row["time"]
        lines.append([ROWS[key].label, "each its own" if time is None else f"{time:.2f}x", *cells])
    header = ["share of every hidden width", "training", *[f"{share:.0%}" for share in shares]]
    seeds = f", means and standard deviations over {found['seeds']} seeds" if found["seeds"] > 1 else ""
    text = (
        f"### {found['title']}\n\n![accuracy by width and by parameters](results/structural_dropout-{name}.png)\n\n"
        f"{markdown(header, lines)}\n\n"
        f"Test accuracy{seeds}; bold: the best that one network gives at this width. training: CPU time in that of the "
        f"dense network ({found['steps']:,} steps), without the seconds or minutes that squeezing takes. "
        f"Parameters: {', '.join(f'{params:,}' for _, params in found['params'])}."
    )
    if missing := [ROWS[key].label for key in DRAWN if key not in found["rows"]]:
        text += f" Not measured: {'; '.join(missing)}."
    return "\n\n".join([text, *_options(found), *_curve(found)])


def _options(found: Mapping[str, Any]) -> list[str]:
    if "options" not in found:
        return []
    lines = []
    for option, values in found["options"].items():
        test, held_out = values["test"], values["held out"]["mean"]
        wide = [value for share, value in zip(test["shares"], held_out, strict=True) if share >= 0.25]
        lines.append([option or "our defaults", _percent(sum(wide) / len(wide)), *map(_percent, test["mean"])])
    shares = next(iter(found["options"].values()))["test"]["shares"]
    return [
        "The options, each changed alone: the held-out accuracy, its mean over widths from 25 %, and test "
        f"accuracies:\n\n{markdown(['option', 'held out', *[f'{share:.0%}' for share in shares]], lines)}"
    ]


def _curve(found: Mapping[str, Any]) -> list[str]:
    lines = [
        [p["label"], f"{p['params']:,}", f"{p['macs']:,}", _percent(p["score"]), _percent(p["test"])]
        for p in found["curve"]
        if p["front"]
    ]
    if not lines:
        return ["Its curve was not measured."]
    return [
        "The front of `method.curve` of our defaults: equal shares, and widths searched site by site on held-out "
        f"rows:\n\n{markdown(['point', 'params', 'MACs', 'held out', 'test'], lines)}"
    ]


def _costs(results: Mapping[str, Any]) -> str:
    costs = {**results["paper_mlps"], **{found["title"]: found["costs"] for found in results["networks"].values()}}
    lines = [
        [name, f"{c['dense'] * 1e3:.1f} ms", f"{c['published / dense']:.2f}x", f"{c['defaults / dense']:.2f}x"]
        for name, c in costs.items()
    ]
    return (
        "### What a training step costs\n\n"
        f"{markdown(['network', 'dense', 'as published', 'our defaults'], lines)}\n\n"
        "CPU time of forward, backward and AdamW's step; the three take turns on the same batches."
    )


# ---------------------------------------------------------------------- pictures

DRAWN = ("separate", "magnitude", "squeeze", "published", "defaults", "short", "from dense")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write one picture a network into `folder`, by width and by parameters; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    for name, found in results["networks"].items():
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        params = dict(found["params"])
        for number, key in enumerate(DRAWN):
            if key not in found["rows"]:
                continue
            row = found["rows"][key]
            style = {"label": ROWS[key].label, "color": f"C{number}", "ms": 4}
            values = [100 * value for value in row["mean"]]
            left.plot([100 * share for share in row["shares"]], values, "-" if len(values) > 12 else "o-", **style)
            if key in ("separate", "squeeze"):
                known = [(params[s], v) for s, v in zip(row["shares"], values, strict=True) if s in params]
                right.plot(*zip(*known, strict=True), "o-", **style)
        front = [point for point in found["curve"] if point["front"]]
        for label, searched, mark in (("curve, equal shares", False, "s"), ("curve, searched site by site", True, "^")):
            points = [(p["params"], 100 * p["test"]) for p in front if p["label"].startswith("searched") == searched]
            if points:
                right.plot(*zip(*points, strict=True), mark, label=label, color="C4", mfc="C4" if searched else "none")
        left.set_xlabel("channels kept at every site, %")
        right.set_xlabel("parameters")
        right.xaxis.set_major_formatter("{x:,.0f}")
        right.locator_params(axis="x", nbins=5)
        left.set_ylabel("test accuracy, %")
        figure.suptitle(found["title"])
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        figure.savefig(folder / f"structural_dropout-{name}.png", dpi=110, metadata={"Software": None})
