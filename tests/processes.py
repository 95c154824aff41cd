"""Processes of their own, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Threads of gloo that are still there when an interpreter is taken down may abort it, so that it is left before.
_END = """
import os
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
os._exit(0)
"""


def listen_to_ctrl_c() -> None:
    """For `preexec_fn`: what was started in the background hands down to its children that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_two_processes(script: str, folder: Path, *arguments: str | Path) -> None:
    """Run a script in two processes, which end together; it finds `arguments` in `sys.argv`, and the tests' modules."""
    path = folder / "worker.py"
    path.write_text(script + _END)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "default",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
