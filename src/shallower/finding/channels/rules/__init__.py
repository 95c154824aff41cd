"""How operations move channels, one rule a kind of operation. Importing this registers all of them."""

from shallower.finding.channels.rules import (
    attending,
    contracting,
    elementwise,
    images,
    making,
    norms,
    parting,
    picking,
    recurrent,
    reducing,
    refusing,
    routing,
    shaping,
)

__all__ = [
    "attending",
    "contracting",
    "elementwise",
    "images",
    "making",
    "norms",
    "parting",
    "picking",
    "recurrent",
    "reducing",
    "refusing",
    "routing",
    "shaping",
]
