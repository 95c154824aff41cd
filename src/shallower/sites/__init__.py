"""What of a network can be lost: sites and their parts, as data."""

from shallower.sites.bridge import Bridge, Stage
from shallower.sites.collection import Sites, overlapping
from shallower.sites.parts import Between, Heads, LinearMap, Place, Residual, Rows
from shallower.sites.site import Kind, Site

__all__ = [
    "Between",
    "Bridge",
    "Heads",
    "Kind",
    "LinearMap",
    "Place",
    "Residual",
    "Rows",
    "Site",
    "Sites",
    "Stage",
    "overlapping",
]
