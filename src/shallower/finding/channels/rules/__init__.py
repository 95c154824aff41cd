"""How operations move channels, one rule a kind of operation. Importing this registers all of them."""

from shallower.finding.channels.rules import attending, contracting, elementwise, moving, reducing

__all__ = ["attending", "contracting", "elementwise", "moving", "reducing"]
