"""Squeezing a model whose weights are on disk: how much memory that takes.

A Llama of random weights is loaded, its sites are found, squeezed to equal widths of 80 % of the parameters, surgery is
proven, and the result is saved. Counted is by how much the anonymous memory of the process grows at most, loading
included: what the system cannot drop. Weights that are mapped from files are not in it. `in memory` loads the model as
usual, `offloaded` has Accelerate put all of it on disk. Without sensitivity, on 1,024 tokens.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import markdown
from benchmarks.squeeze import remembered
from shallower.core.memory import give_back
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_params
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze
from shallower.saving.checkpoint import save
from shallower.saving.vision import repair_torchvision
from shallower.surgery.applying import apply

WAYS = ("offloaded", "in memory")


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:  # noqa: ARG001
    """Both ways; each row is kept in `cache`."""
    repair_torchvision()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder) / "whole", quick)
        for way in WAYS:
            name = way.replace(" ", "-")
            rows.append(remembered(cache / f"{name}.json", lambda w=way: squeezed(w, Path(folder))))  # type: ignore[misc]
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    """One line for each way."""
    lines = [
        (
            row["way"],
            f"{row['weights'] / 2**20:.0f} MiB",
            f"{row['after'] / 2**20:.0f} MiB",
            f"{row['growth'] / 2**20:.0f} MiB",
            f"{row['cpu']:.0f} s",
        )
        for row in results["rows"]
    ]
    return markdown(("weights are", "all weights", "of the result", "memory growth", "CPU time"), lines)


def write_llama(folder: Path, quick: bool) -> None:
    """A Llama of 24 blocks and random weights, on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, hidden, blocks = (64, 96, 3) if quick else (896, 1024, 24)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def squeezed(way: str, folder: Path) -> dict[str, Any]:
    """Load, squeeze, apply and save."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 1000, (4, 64), generator=generator)} for _ in range(4)]
    place: dict[str, Any] = {}
    if way == "offloaded":
        place = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
    with growth_of_anonymous() as grown:
        cpu = time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder / "whole", **place).eval()
        weights = sum(p.nbytes for p in model.parameters())
        sites = find_sites(model, batches[0])
        options = SqueezeOptions(sensitivity=False, producers=False)
        plan = squeeze(model, sites, batches, "params:80%", uniform=True, options=options)
        small = apply(model, plan, batches[0])
        save(small, folder / f"small-{way.replace(' ', '-')}")
        spent = time.process_time() - cpu
    after = count_params(small) * weights // sites.params
    return {"way": way, "weights": weights, "after": after, "growth": grown[0], "cpu": spent}


@contextmanager
def growth_of_anonymous() -> Iterator[list[int]]:
    """By how many bytes the anonymous memory of this process grows at most."""

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024

    give_back()
    start, found, stop = now(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found[0] = max(found[0], now() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
