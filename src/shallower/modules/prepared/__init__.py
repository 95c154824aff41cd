"""Layers of PyTorch made ready for a cut: those whose own form does not allow it take another first."""
