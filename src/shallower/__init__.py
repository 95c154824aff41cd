"""Shallower squeezes the depth and the width out of trained PyTorch networks and gives back plain dense models.

    import shallower as sh

    sites = sh.find_sites(model, example_inputs)
    plan = sh.Plan.collapse(sites)
    small = sh.apply(model, plan, example_inputs)
    sh.save(small, "out/")
"""

from shallower.budget import Target
from shallower.checkpoint import load, save
from shallower.errors import ShallowerError
from shallower.inputs import Inputs
from shallower.matching import find_sites
from shallower.measure import Measurement, compare, measure
from shallower.methods.layer_collapse import LayerCollapse
from shallower.plan import Entry, Fate, Fit, Plan
from shallower.sites import LinearMap, Place, Site, Sites
from shallower.surgery import apply, simulate

__version__ = "0.1.0"

__all__ = [
    "Entry",
    "Fate",
    "Fit",
    "Inputs",
    "LayerCollapse",
    "LinearMap",
    "Measurement",
    "Place",
    "Plan",
    "ShallowerError",
    "Site",
    "Sites",
    "Target",
    "apply",
    "compare",
    "find_sites",
    "load",
    "measure",
    "save",
    "simulate",
]
