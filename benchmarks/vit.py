"""A small vision transformer on CIFAR-10: the curve over the number of collapsed MLPs, and two ways to collapse.

Trained from scratch on 13,500 rows of the shared subset; 1,500 are held out for choices; the test set is only reported
on. From one dense network LayerCollapse takes one MLP after another, the dense network is trained on for as long.
After each stage both collapses are made of the same network: as if the slope were exactly 1, and with the best affine
map for the distribution of each channel's input.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.images import Batches, accuracy, cifar10, cross_entropy, normalised
from benchmarks.record import markdown, stage, write_json
from shallower.calibrating.moments import collect
from shallower.core.text import amount
from shallower.finding.kinds import find_sites
from shallower.measuring.measurement import compare, measure
from shallower.methods.collapsing.layer_collapse import AffineRule, LayerCollapse
from shallower.planning.plan import Plan
from shallower.saving.vision import repair_torchvision
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training import History, Recipe, train

HELD_OUT = 1500
BATCH = 64
LAYERS = 4
FROM_SCRATCH = Recipe(epochs=10, lr=1.5e-3, weight_decay=0.05, warmup=0.1)
STAGE_EPOCHS = 2
STRENGTH = 12.0
CALIBRATION = 512
"""Rows of the training set that the best affine map is computed on."""
AFFINE: tuple[AffineRule, ...] = ("unit", "calibration")


def recipe_of(number: int, quick: bool = False) -> Recipe:
    """How stage `number` trains, dense or with LayerCollapse."""
    return Recipe(epochs=1 if quick else STAGE_EPOCHS, lr=7e-4, weight_decay=0.05, warmup=0.05, seed=1 + number)


def network(layers: int = LAYERS, seed: int = 0, *, patch: int = 4, heads: int = 3) -> nn.Module:
    """A ViT for 32x32 images: width 96, hidden width 384."""
    repair_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=96, depth=layers, num_heads=heads, num_classes=10
    )
    return model


class Work:
    """The data, and the stages that others build on."""

    def __init__(self, data: Path, quick: bool, cache: Path) -> None:
        rows, test = cifar10(data, "train", cache.parent), cifar10(data, "test", cache.parent)
        self.quick, self.cache = quick, cache
        self.layers = 2 if quick else LAYERS
        self.held_out = rows[:100] if quick else rows[:HELD_OUT]
        self.batches = Batches(rows[HELD_OUT : HELD_OUT + 256] if quick else rows[HELD_OUT:], BATCH)
        self.test = test[:200] if quick else test
        chosen = rows[HELD_OUT : HELD_OUT + (128 if quick else CALIBRATION)]
        self.calibration = list(torch.split(normalised(chosen.pixels), BATCH))
        self.example = normalised(self.test.pixels[:8])
        self.from_scratch_recipe = dataclasses.replace(FROM_SCRATCH, epochs=1) if quick else FROM_SCRATCH
        self.settings = (self.from_scratch_recipe, BATCH, self.layers, quick)

    def score(self, model: nn.Module) -> float:
        """Accuracy on the rows that are held out."""
        return accuracy(model, self.held_out)

    def from_scratch(self) -> tuple[nn.Module, History]:
        """The dense network that everything starts from."""
        model = network(self.layers)
        path = stage(self.cache, "from-scratch", *self.settings)
        label = "training from scratch"
        recipe = self.from_scratch_recipe
        return model, train(model, self.batches, cross_entropy, recipe, score=self.score, checkpoint=path, label=label)

    def dense(self, model: nn.Module, number: int) -> History:
        """Trains the dense network as long as stage `number` does; in place."""
        recipe = recipe_of(number, self.quick)
        path = stage(self.cache, f"dense-{number}", *self.settings, recipe)
        label = f"dense, stage {number + 1}/{self.layers}"
        return train(model, self.batches, cross_entropy, recipe, score=self.score, checkpoint=path, label=label)

    def mlps(self, model: nn.Module) -> Sites:
        """The MLPs that have not collapsed."""
        return find_sites(model.eval(), self.example).select(lambda site: site.kind == "feed-forward")

    def order(self, model: nn.Module) -> list[str]:
        """The MLPs, those first whose collapse alone would change the outputs least."""
        model = copy.deepcopy(model)
        costs = LayerCollapse(model, self.mlps(model)).sensitivity(self.calibration)
        return sorted(costs, key=lambda name: costs[name])

    def untrained(self, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """Test accuracy of the dense network with the MLPs `names` collapsed at once, without any training."""
        sites = self.mlps(model).select(lambda site: site.name in names)
        if not names:
            return dict.fromkeys(AFFINE, accuracy(model, self.test))
        moments = collect(model, sites, self.calibration)
        fitted = [
            dataclasses.replace(entry, slopes=slopes, offsets=offsets)
            for entry in Plan.collapse(sites).entries
            for slopes, offsets in [moments[entry.site.name].best_affine()]
        ]
        plans = {"unit": Plan.collapse(sites), "calibration": Plan(tuple(fitted))}
        return {affine: accuracy(apply(model, plan, self.example), self.test) for affine, plan in plans.items()}

    def merged(self, model: nn.Module, method: LayerCollapse, affine: AffineRule) -> nn.Module:
        """The network with all attached sites collapsed, whatever their slopes are."""
        batches = self.calibration if affine == "calibration" else None
        return apply(model, method.plan(tolerance=1.01, affine=affine, batches=batches), self.example)

    def collapsed(
        self, model: nn.Module, number: int, name: str
    ) -> tuple[dict[AffineRule, nn.Module], list[dict[str, float]]]:
        """The network with `name` collapsed too, in both ways, and how both did on held-out rows after each epoch."""
        model = copy.deepcopy(model)
        recipe = recipe_of(number, self.quick)
        method = LayerCollapse(model, self.mlps(model).select(name), STRENGTH, decoupled=True)
        path = stage(self.cache, f"collapse-{number}", *self.settings, recipe, name, STRENGTH)
        epochs = path.with_suffix(".json")
        seen: list[dict[str, float]] = json.loads(epochs.read_text()) if path.exists() else []

        def look(attached: nn.Module) -> float:
            found = {affine: accuracy(self.merged(attached, method, affine), self.held_out) for affine in AFFINE}
            seen.append({"slope": float(method.slopes()[name].mean()), **{str(a): value for a, value in found.items()}})
            write_json(epochs, seen)
            return found["calibration"]

        label = f"collapse, stage {number + 1}/{self.layers}"
        train(model, self.batches, cross_entropy, recipe, method=method, score=look, checkpoint=path, label=label)
        return {affine: self.merged(model, method, affine) for affine in AFFINE}, seen[-recipe.epochs :]


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:
    """Train, collapse one MLP after another, train the dense network on for as long, measure."""
    work = Work(data, quick, cache)
    dense, history = work.from_scratch()
    order = work.order(dense)
    small, trained = dense, copy.deepcopy(dense)
    models = {"0": dense}
    rows: list[dict[str, Any]] = []
    for count in range(work.layers + 1):
        row: dict[str, Any] = {"collapsed": count, "untrained": work.untrained(dense, order[:count])}
        if count == 0:
            row["test"] = dict(row["untrained"])
            row["epochs"] = []
        else:
            both, row["epochs"] = work.collapsed(small, count - 1, order[count - 1])
            row["test"] = {affine: accuracy(model, work.test) for affine, model in both.items()}
            small = models[str(count)] = both["calibration"]
            work.dense(trained, count - 1)
        row["dense_test"] = accuracy(trained, work.test)
        rows.append(row)
    shape = (2 if quick else 32, 3, 32, 32)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    timed = compare(models, example, rounds=5 if quick else 40)
    costs = {name: measure(model, example, repeats=2, seconds=0.0) for name, model in models.items()}
    for row in rows:
        name = str(row["collapsed"])
        row |= {
            "params": costs[name].params,
            "macs": costs[name].macs,
            "latency": dataclasses.asdict(timed[name]),
            "promised": costs["0"].macs / costs[name].macs,
            "measured": timed[name].speedup,
        }
    return {
        "recipes": [dataclasses.asdict(r) for r in (work.from_scratch_recipe, recipe_of(0, quick))],
        "batch": BATCH,
        "strength": STRENGTH,
        "images": {"train": len(work.batches.images), "held out": len(work.held_out), "test": len(work.test)},
        "order": order,
        "from_scratch": dataclasses.asdict(history),
        "timed": {"batch": shape[0]},
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Accuracy of both collapses, cost and speed for each number of collapsed MLPs."""
    header = ["collapsed", "slope 1", "best affine", "dense, as long", "untrained: slope 1", "best affine"]
    header += ["params", "MACs", "latency", "promised", "measured"]
    layers = len(results["rows"]) - 1
    rows = []
    for row in results["rows"]:
        accuracies = [*row["test"].values(), row["dense_test"], *row["untrained"].values()]
        rows.append(
            [
                f"{row['collapsed']} of {layers}",
                *[f"{value:.2%}" for value in accuracies],
                f"{row['params']:,}",
                amount(row["macs"]),
                f"{row['latency']['latency'] * 1e3:.1f} ms",
                f"{row['promised']:.2f}x",
                f"{row['measured']:.2f}x",
            ]
        )
    epochs = [
        [
            f"{row['collapsed']} of {layers}, epoch {i}",
            f"{e['slope']:.3f}",
            f"{e['unit']:.2%}",
            f"{e['calibration']:.2%}",
        ]
        for row in results["rows"]
        for i, e in enumerate(row["epochs"], 1)
    ]
    return (
        f"{markdown(header, rows)}\n\n"
        f"Test accuracy. MACs and latency: {results['timed']['batch']} images, float32. promised: MACs before / after. "
        f"Collapsed in this order: {', '.join(results['order'])}.\n\n"
        "Both collapses of the same network while its slope goes to 1, on the held-out rows:\n\n"
        f"{markdown(['', 'slope', 'slope 1', 'best affine'], epochs)}"
    )
