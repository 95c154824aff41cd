"""How long the choice of channels takes: backward elimination of half of the channels, from Gram matrices alone.

Random Gram matrices of the size that a site of this hidden width and model width has, on one thread; seconds of
processor time, so that a load from elsewhere does not count. The largest needs 10 GB of memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import markdown
from shallower.calibrating.selection import eliminate

SIZES = ((1536, 384), (4096, 1024), (14336, 4096))
"""Hidden width and model width: MiniLM, a BERT-large, a language model of eight billion parameters."""


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:  # noqa: ARG001
    """Measure every size."""
    return {"seed": 0, "rows": [seconds(*size) for size in (SIZES[:1] if quick else SIZES)]}


def seconds(n: int, d: int) -> dict[str, Any]:
    """One size."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n // 4, n, generator=generator)
    zz = (rows.T @ rows).double() / len(rows)
    zz += torch.eye(n, dtype=zz.dtype)
    del rows
    zy = torch.randn(n, d, generator=generator, dtype=torch.float64)
    start = time.process_time()
    eliminate(zz, zy, ridge=1e-4, keep=n // 2)
    return {"width": n, "outputs": d, "removed": n - n // 2, "seconds": time.process_time() - start}


def table(results: dict[str, Any]) -> str:
    """One line for each size."""
    lines = [(str(r["width"]), str(r["outputs"]), str(r["removed"]), f"{r['seconds']:.1f} s") for r in results["rows"]]
    return markdown(("hidden width", "outputs", "channels removed", "processor time"), lines)
