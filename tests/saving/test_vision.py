"""torchvision is imported also where its operators are missing, and left alone where it works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(script: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_saved_after_transformers_was_imported() -> None:
    pytest.importorskip("transformers")
    script = """
import tempfile, transformers, torch, shallower as sh
sh.save(torch.nn.Linear(2, 2), tempfile.mkdtemp() + "/out")
print("saved")
"""
    assert run(script) == "saved"


def test_nothing_of_a_working_installation_is_touched() -> None:
    pytest.importorskip("torchvision")
    script = """
import sys
from shallower.saving.vision import import_torchvision, repair_torchvision
first = import_torchvision()
before = {name: module for name, module in sys.modules.items() if name.startswith("torchvision")}
repair_torchvision()
assert import_torchvision() is first
assert all(sys.modules[name] is module for name, module in before.items())
print("alone")
"""
    assert run(script) == "alone"


def test_without_torchvision_there_is_nothing_to_repair() -> None:
    script = """
import sys
sys.modules["torchvision"] = None
from shallower.errors import ModelError
from shallower.saving.vision import import_torchvision
try:
    import_torchvision()
except ModelError as error:
    print(str(error).partition(" (")[0])
"""
    assert run(script) == "torchvision cannot be imported"
