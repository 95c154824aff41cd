"""What each method does on the way of `shallower compress`, one file each; see `compression.MethodRun`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallower.app.compression import MethodRun

_HOMES: Mapping[str, str] = {
    "squeeze": "squeeze:SqueezeRun",
    "layer-collapse": "layer_collapse:LayerCollapseRun",
    "tlc": "till_layers_collapse:TillLayersCollapseRun",
    "structural-dropout": "structural_dropout:StructuralDropoutRun",
}


def run_named(name: str, **options: Any) -> MethodRun:
    """The run of the method that `--method` calls so, with its own options."""
    module, _, kind = _HOMES[name].partition(":")
    run: MethodRun = getattr(import_module(f"shallower.app.runs.{module}"), kind)(**options)
    return run


def run_names() -> tuple[str, ...]:
    """All of them."""
    return tuple(_HOMES)
