"""Squeezing from the command line, interrupted as a person does it, and gone on with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.processes import listen_to_ctrl_c

pytest.importorskip("datasets")

DEEP = f"{__name__}:make_deep"
ROOT = Path(__file__).parents[2]


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return x + y


def make_deep() -> nn.Module:
    """Twenty wide feed-forward blocks, so that squeezing them one by one takes some seconds."""
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(36, 512), nn.GELU(), nn.Linear(512, 36)) for _ in range(20)]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(36, 3))


def shallower(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    program = [sys.executable, "-m", "shallower", *map(str, arguments)]
    return subprocess.Popen(
        program,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        preexec_fn=listen_to_ctrl_c,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--linear-path",)], ids=["plain", "with linear paths"])
def test_an_interrupted_squeezing_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "rows.npz", image=random.integers(0, 255, (400, 6, 6), dtype=np.uint8), label=np.arange(400) % 3
    )

    def command(output: str) -> list[object]:
        given = ("--data", tmp_path / "rows.npz", "--task", "image-classification", "--device", "cpu")
        given = (*given, "--method", "squeeze", "--uniform")
        return ["compress", DEEP, *given, "--target", "params:40%", "--output", tmp_path / output, *options]

    progress = tmp_path / ".out.progress" / "squeeze"
    with shallower(*command("out")) as running:
        until = time.monotonic() + 300
        while not list(progress.glob("*-0000")) and running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=300)
    assert running.returncode == 130, told
    assert "the same command continues from" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
    assert list(progress.glob("*-0000/plan.json"))
    for output in ("out", "undisturbed"):
        with shallower(*command(output)) as running:
            _, told = running.communicate(timeout=600)
        assert running.returncode == 0, told
    assert not progress.exists()
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "undisturbed"))
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)
