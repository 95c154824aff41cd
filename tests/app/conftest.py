"""What the tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of 6x6 pictures that are told apart by which third is bright."""
    labels = np.arange(150) % 3
    x = np.random.default_rng(0).integers(0, 60, (150, 6, 6), dtype=np.uint8)
    for row, label in zip(x, labels, strict=True):
        row[2 * label : 2 * label + 2] += 150
    np.savez(tmp_path / "pictures.npz", image=x, label=labels)
    return tmp_path / "pictures.npz"
