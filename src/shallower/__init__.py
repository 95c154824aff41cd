"""Shallower squeezes the depth and the width out of trained PyTorch networks and gives back plain dense models.

    import shallower as sh

    sites = sh.find_sites(model, example_inputs)
    plan = sh.Plan.collapse(sites)
    small = sh.apply(model, plan, example_inputs)
    sh.save(small, "out/")

The names are imported when they are first used, so that the command line answers before PyTorch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallower.budget import Target
    from shallower.checkpoint import load, save
    from shallower.curve import Curve
    from shallower.errors import ShallowerError
    from shallower.exporting import Exported, export
    from shallower.healing import heal
    from shallower.inputs import Inputs
    from shallower.matching import find_sites
    from shallower.measuring import Measurement, compare, measure
    from shallower.merging import choose_forms
    from shallower.methods.layer_collapse import LayerCollapse
    from shallower.methods.layer_folding import LayerFolding
    from shallower.methods.squeeze import squeeze
    from shallower.methods.structural_dropout import StructuralDropout
    from shallower.methods.till_layers_collapse import TillLayersCollapse
    from shallower.padding import border_error, move_padding, worth_moving
    from shallower.plan import Entry, Fate, Fit, Plan
    from shallower.sites import Between, Heads, LinearMap, Place, Residual, Site, Sites
    from shallower.surgery import apply, simulate
    from shallower.varying import varied

__version__ = "0.1.0"

_HOMES = {
    "Between": "sites",
    "Curve": "curve",
    "Entry": "plan",
    "Exported": "exporting",
    "Fate": "plan",
    "Fit": "plan",
    "Heads": "sites",
    "Inputs": "inputs",
    "LayerCollapse": "methods.layer_collapse",
    "LayerFolding": "methods.layer_folding",
    "LinearMap": "sites",
    "Measurement": "measuring",
    "Place": "sites",
    "Plan": "plan",
    "Residual": "sites",
    "ShallowerError": "errors",
    "Site": "sites",
    "Sites": "sites",
    "StructuralDropout": "methods.structural_dropout",
    "Target": "budget",
    "TillLayersCollapse": "methods.till_layers_collapse",
    "apply": "surgery",
    "border_error": "padding",
    "choose_forms": "merging",
    "compare": "measuring",
    "export": "exporting",
    "find_sites": "matching",
    "heal": "healing",
    "load": "checkpoint",
    "measure": "measuring",
    "move_padding": "padding",
    "save": "checkpoint",
    "simulate": "surgery",
    "squeeze": "methods.squeeze",
    "varied": "varying",
    "worth_moving": "padding",
}

__all__ = [
    "Between",
    "Curve",
    "Entry",
    "Exported",
    "Fate",
    "Fit",
    "Heads",
    "Inputs",
    "LayerCollapse",
    "LayerFolding",
    "LinearMap",
    "Measurement",
    "Place",
    "Plan",
    "Residual",
    "ShallowerError",
    "Site",
    "Sites",
    "StructuralDropout",
    "Target",
    "TillLayersCollapse",
    "apply",
    "border_error",
    "choose_forms",
    "compare",
    "export",
    "find_sites",
    "heal",
    "load",
    "measure",
    "move_padding",
    "save",
    "simulate",
    "squeeze",
    "varied",
    "worth_moving",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shallower' has no attribute {name!r}")
    value = getattr(import_module(f"shallower.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
