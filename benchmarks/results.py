"""docs/results.md, made from docs/results/*.json: `python -m benchmarks results`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

INTRODUCTION = """# Results

Made by `python -m benchmarks results` from the JSON files in [results/](results/); every number comes out of the
command that stands above its table. `python -m benchmarks NAME --quick` is a small run of the same code in seconds.
Latencies are medians over rounds in which the models take turns. The machine had other work to do meanwhile, so that
their ratios, taken within a round, say more than the milliseconds.
"""


def write(docs: Path) -> Path:
    """Write `docs`/results.md from `docs`/results/*.json."""
    found = [json.loads(path.read_text()) for path in sorted((docs / "results").glob("*.json"))]
    page = docs / "results.md"
    page.write_text("\n".join([INTRODUCTION, *[section(results) for results in found]]))
    return page


def section(results: dict[str, Any]) -> str:
    """One benchmark: what it does, its command, its table, and what it was made with."""
    module = importlib.import_module(f"benchmarks.{results['name']}")
    title, _, text = (module.__doc__ or "").strip().partition("\n\n")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"## {title.rstrip('.')}\n\n{text.strip()}\n\n    {results['command']}\n\n{module.table(results)}\n\n"
        f"{results['machine']}, {results['threads']} thread{'s' * (results['threads'] != 1)}; {versions}.\n"
    )
