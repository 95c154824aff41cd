"""What of a network can be lost: sites and their parts, as data."""

from shallower.sites.site import Between, Heads, LinearMap, Place, Residual, Site, Sites

__all__ = ["Between", "Heads", "LinearMap", "Place", "Residual", "Site", "Sites"]
