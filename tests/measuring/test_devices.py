"""What a device is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from shallower.measuring.devices import device_name, processor_name


def test_a_processor_is_named_by_its_model_where_the_system_says_it():
    assert processor_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if named:
        assert processor_name() == named[0] != platform.machine()


def test_a_device_says_where_it_is_and_what_it_is():
    assert device_name(torch.device("cpu")) == f"cpu {processor_name()}"
    assert device_name(torch.device("meta")) == "meta"
