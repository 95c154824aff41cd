"""A small network and its data in memory, for the runs of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shallower.app.batching import TaskBatches
from shallower.app.compression import Work
from shallower.app.tasks import Classification
from shallower.planning.targets import Target
from shallower.training import Recipe


class Net(nn.Sequential):
    """A network during whose training somebody may press Ctrl-C."""

    interrupt_in: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = torch.is_grad_enabled() and next(self.parameters()).requires_grad
        if trained and Net.interrupt_in is not None:
            Net.interrupt_in -= 1
            if Net.interrupt_in == 0:
                raise KeyboardInterrupt
        y: torch.Tensor = super().forward(x)
        return y


def network(*, normed: bool = False) -> nn.Module:
    """Two wide layers for rows of 8 numbers and three classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)]
    if normed:
        layers.insert(1, nn.BatchNorm1d(48))
    return nn.Sequential(*layers).eval()


def batches(seed: int = 0) -> TaskBatches:
    """Rows whose class is the largest of their first three numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(240, 8, generator=generator)
    rows = TensorDataset(x, x[:, :3].argmax(1))
    train, validation, test = (TensorDataset(*rows[part]) for part in (slice(160), slice(160, 200), slice(200, 240)))
    shuffled = DataLoader(train, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return TaskBatches(shuffled, DataLoader(validation, 40), DataLoader(test, 40), x[160:168], seed)


def work(target: str = "", *, normed: bool = False, epochs: int = 2, folder: Path | None = None, **more: Any) -> Work:
    """What there is to do with that network."""
    goal = None
    if target:
        goal = Target.parse(target)
    recipe = Recipe(epochs, 1e-2, warmup=0.1)
    return Work(network(normed=normed), batches(), Classification(), goal, recipe, checkpoints=folder, cpu=True, **more)
