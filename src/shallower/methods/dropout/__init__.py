"""Structural Dropout: one training, every width."""
