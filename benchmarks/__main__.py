"""The command: `python -m benchmarks NAME [--data DIR] [--quick] [--out DIR] [--cache DIR]`, or `results`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.record import circumstances, write_json
from shallower.errors import ShallowerError

NAMES = (
    "vgg",
    "sst2",
    "vit",
    "slope_overhead",
    "squeeze",
    "arena",
    "depth",
    "floors",
    "selection",
    "structural_dropout",
    "tlc",
    "offloaded",
    "mutations",
    "zoo",
    "zoo_branches",
)
ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, print its table and write its JSON; or make docs/results.md from all JSONs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "results"), help="a benchmark, or: make docs/results.md")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("SHALLOWER_DATA", ROOT.parent / "shared" / "data")),
        help="folder of the data (default: $SHALLOWER_DATA)",
    )
    parser.add_argument("--quick", action="store_true", help="a small real run; its results are not for docs/")
    parser.add_argument("--family", default="", help="of the zoos: only families whose names begin like this")
    parser.add_argument(
        "--network",
        default="",
        help="of the arena and the floors: only this network; the others as far as they are done",
    )
    parser.add_argument("--out", type=Path, help="folder for NAME.json (default: docs/results, with --quick build)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder of cached stages")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.name == "results":
        results.write(ROOT / "docs")
        return 0
    out = given.out or ROOT / ("build" if given.quick or given.family else "docs/results")
    try:
        print(execute(given.name, given.data, given.quick, given.cache, out, given.family or given.network))
    except ShallowerError as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 1
    return 0


def execute(name: str, data: Path, quick: bool, cache: Path, out: Path, family: str = "") -> str:
    """Run one benchmark and write `out`/NAME.json; its table.

    Raises:
        ShallowerError: the data is not there, or something goes wrong on the way.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    cache = cache / (f"{name}-quick" if quick else name)
    chosen = [family] if family else []
    command = f"python -m benchmarks {name}" + (" --quick" if quick else "")
    found = {
        "name": name,
        "command": command,
        "quick": quick,
        **circumstances(),
        **module.run(data, quick, cache, *chosen),
    }
    write_json(out / f"{name}.json", found)
    if hasattr(module, "draw"):
        module.draw(found, out)
    table: str = module.table(found)
    return table


if __name__ == "__main__":
    sys.exit(main())
