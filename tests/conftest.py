"""Shared fixtures: where the real data lies, and an installation that can import torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from shallower.saving.vision import repair_torchvision

repair_torchvision()
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data and trained weights; the test is skipped where there is none."""
    folder = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SHALLOWER_DATA")
    return folder
