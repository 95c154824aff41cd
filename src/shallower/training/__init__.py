"""The training loop, rounds of it, and healing after surgery."""

from shallower.training.loop import train
from shallower.training.recipe import Checkpoint, History, Recipe

__all__ = ["Checkpoint", "History", "Recipe", "train"]
