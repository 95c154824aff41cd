"""The training loop, and healing after surgery."""

from shallower.training.loop import Recipe, train

__all__ = ["Recipe", "train"]
