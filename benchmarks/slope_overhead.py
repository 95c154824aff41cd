"""What slope activations cost in training: a step with all sites attached against a step of the plain model.

The two steps are taken in pairs, one directly after the other and each first every other time, so that a load from
elsewhere falls on both; the ratio of a pair is what counts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.inputs import call
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.saving.vision import repair_torchvision

PAIRS = 40
WARM_UP = 3


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:  # noqa: ARG001
    """Measure both models in float32 and under bf16 autocast."""
    repair_torchvision()
    rows = []
    for name, build in (("BERT 4 x 256, 32 x 64 tokens", _bert), ("ViT 4 x 96, 64 images of 32 x 32", _vit)):
        for precision in ("float32",) if quick else ("float32", "bf16 autocast"):
            torch.manual_seed(0)
            model, inputs, labels = build()
            rows.append(
                {"model": name, "precision": precision}
                | overhead(model, inputs, labels, precision, 4 if quick else PAIRS)
            )
    return {"seed": 0, "pairs": rows[0]["pairs"], "rows": rows}


def table(results: dict[str, Any]) -> str:
    """A Markdown table of step times and ratios."""
    lines = [
        "| model | precision | sites | plain step | with slopes | ratio (median) | quartiles of the ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['precision']} | {r['sites']} | {r['plain'] * 1e3:.0f} ms | {r['attached'] * 1e3:.0f} ms "
        f"| {r['ratio']:.3f}x | {r['quartiles'][0]:.3f} - {r['quartiles'][1]:.3f} |"
        for r in results["rows"]
    ]
    return "\n".join(lines)


def overhead(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, precision: str, pairs: int) -> dict[str, Any]:
    """Median step times and the median and quartiles of their ratio over `pairs` interleaved pairs."""
    attached = copy.deepcopy(model)
    method = LayerCollapse(attached, find_sites(attached, inputs))
    steps = (_stepper(model, None, inputs, labels, precision), _stepper(attached, method, inputs, labels, precision))
    times: list[tuple[float, float]] = []
    for pair in range(WARM_UP + pairs):
        taken = [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            taken[which] = steps[which]()
        times.append((taken[0], taken[1]))
    times = times[WARM_UP:]
    ratios = [with_slopes / plain for plain, with_slopes in times]
    return {
        "sites": len(method.sites),
        "pairs": pairs,
        "plain": statistics.median(plain for plain, _ in times),
        "attached": statistics.median(with_slopes for _, with_slopes in times),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def _stepper(
    model: nn.Module, method: LayerCollapse | None, inputs: dict[str, Tensor], labels: Tensor, precision: str
) -> Callable[[], float]:
    groups = model.parameters() if method is None else method.param_groups(weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        start = time.perf_counter()
        if method is not None:
            method.before_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            loss = nn.functional.cross_entropy(call(model, inputs).logits, labels)
        torch.autograd.backward(loss if method is None else loss + method.penalty())
        optimizer.step()
        optimizer.zero_grad()
        if method is not None:
            method.after_step(1e-4)
        return time.perf_counter() - start

    return step


def _bert() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    tokens = torch.randint(config.vocab_size, (32, 64))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return BertForSequenceClassification(config), inputs, torch.randint(2, (32,))


def _vit() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(64, 3, 32, 32)}, torch.randint(10, (64,))
