"""Random numbers of a training: seeded for it alone, and afterwards as they were.

with kept(device, loader):
    seed(3, device)
    ...                             # torch, NumPy and Python draw from seed 3
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def kept(device: torch.device, batches: Any = None) -> Iterator[None]:
    """Afterwards all generators are where they were: torch's, NumPy's and Python's, and those of `batches`.

    A loader that is read after a training then yields the same order whether or not the training was resumed.
    """
    before = state(device)
    own = [(generator, generator.get_state()) for generator in generators(batches)]
    epochs = [(holder, holder.epoch) for holder in _holders(batches) if isinstance(getattr(holder, "epoch", None), int)]
    try:
        yield
    finally:
        set_state(before, device)
        for generator, then in own:
            generator.set_state(then)
        for holder, epoch in epochs:
            holder.epoch = epoch


def seed(number: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, NumPy's and Python's; other devices are left alone."""
    torch.default_generator.manual_seed(number)
    if (module := _device_module(device)) is not None:
        module.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def seed_order(batches: Any, number: int, epoch: int) -> None:
    """Seed the generators that a loader or its sampler draws its order from, and set a sampler's epoch."""
    for generator in generators(batches):
        generator.manual_seed(number)
    for holder in _holders(batches):
        if callable(set_epoch := getattr(holder, "set_epoch", None)):
            set_epoch(epoch)


def generators(batches: Any) -> list[torch.Generator]:
    """The generators of a loader, its sampler and its batch sampler, each once."""
    found = {id(g): g for h in _holders(batches) if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    return list(found.values())


def state(device: torch.device) -> dict[str, Any]:
    """All generators as plain data that a checkpoint can hold."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if (module := _device_module(device)) is not None:
        found[device.type] = module.get_rng_state()
    return found


def set_state(found: Mapping[str, Any], device: torch.device) -> None:
    """Put all generators back to what `state` returned."""
    torch.set_rng_state(found["torch"])
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(found["python"])
    if device.type in found and (module := _device_module(device)) is not None:
        module.set_rng_state(found[device.type])


def _holders(batches: Any) -> list[Any]:
    return [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]


def _device_module(device: torch.device) -> Any:
    """torch.cuda for a CUDA device and its like; the CPU's generator is torch's default one."""
    if device.type in ("cpu", "meta"):
        return None
    return torch.get_device_module(device)
