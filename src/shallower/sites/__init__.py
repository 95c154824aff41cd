"""What of a network can be lost: sites and their parts, as data."""

from shallower.sites.branch import Branch, Emptied
from shallower.sites.bridge import Bridge, Stage
from shallower.sites.collection import Sites, overlapping
from shallower.sites.parts import Between, LinearMap, Place, Residual, Tally, by_name, tally
from shallower.sites.site import Kind, Site
from shallower.sites.slots import Average, ChannelCall, Choice, Follower, Listed, Slot, Span, Written

__all__ = [
    "Average",
    "Between",
    "Branch",
    "Bridge",
    "ChannelCall",
    "Choice",
    "Emptied",
    "Follower",
    "Kind",
    "LinearMap",
    "Listed",
    "Place",
    "Residual",
    "Site",
    "Sites",
    "Slot",
    "Span",
    "Stage",
    "Tally",
    "Written",
    "by_name",
    "overlapping",
    "tally",
]
