"""Results as plain data: what they were made with, where they are kept, and how a stage is not done twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from shallower.errors import DataError
from shallower.measuring.devices import processor_name

PACKAGES = ("shallower", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "numpy")


def circumstances() -> dict[str, Any]:
    """Versions, machine and threads: what a number depends on besides the code."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": _machine(),
        "threads": torch.get_num_threads(),
    }


def _machine() -> str:
    """The name of the GPU, or else of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def stage(cache: Path, name: str, *settings: Any) -> Path:
    """The checkpoint file of a training stage; other settings give another file, so that none is taken for another."""
    plain = [dataclasses.asdict(s) if dataclasses.is_dataclass(s) and not isinstance(s, type) else s for s in settings]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:8]
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{name}-{digest}.safetensors"


def required(path: Path) -> Path:
    """`path`, if it is there.

    Raises:
        DataError: it is not.
    """
    if not path.exists():
        raise DataError(f"no data at {path}; give the folder with --data or set SHALLOWER_DATA")
    return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned so that it also reads well in a terminal; all columns but the first to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([text(lines[0]), rule, *[text(line) for line in lines[1:]]])
