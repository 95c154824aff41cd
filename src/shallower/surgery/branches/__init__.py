"""Branches and layers that are taken away."""
