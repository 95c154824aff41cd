"""Calibrated squeezing: channels chosen and layers refitted from second moments, without training."""
