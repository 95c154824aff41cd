"""What a device is called."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """A device for people and for files: where it is, and the name of the processor.

    device_name(torch.device("cpu"))        # "cpu Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    """
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {processor_name()}" if device.type == "cpu" else str(device)


@cache
def processor_name() -> str:
    """The model name of this machine's processor, its architecture where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
