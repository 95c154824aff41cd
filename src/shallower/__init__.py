"""Shallower squeezes the depth and the width out of trained PyTorch networks and gives back plain dense models."""
