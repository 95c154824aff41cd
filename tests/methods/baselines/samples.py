"""A small layer and what it reads, from formulas, so that the authors' code could be run on the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Gram
from shallower.finding.kinds import find_sites
from shallower.methods.baselines.view import View
from shallower.sites import Site


def waves(rows: int, columns: int, phase: float) -> Tensor:
    """(rows, columns) float64 numbers without a pattern."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return torch.sin(phase + 0.7 * i + 1.3 * j + 0.37 * i * j + 0.011 * i * i * j)


def channels(width: int = 12, outputs: int = 5) -> tuple[nn.Module, Site, Tensor]:
    """A network with one hidden site, the site, and what its consumer reads: (40, width)."""
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, outputs, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(waves(width, 4, 0.3))
        model[0].bias.copy_(waves(1, width, 0.9)[0])
        model[2].weight.copy_(waves(outputs, width, 2.0))
    (site,) = find_sites(model, torch.ones(1, 4, dtype=torch.float64))
    return model, site, waves(40, width, 1.0).relu() * (1 + torch.arange(width) % 3)


def view(full: bool = False, seed: int = 0) -> View:
    """The site of `channels` as a rival sees it."""
    model, site, z = channels()
    gram = Gram.of(z) if full else Gram.of(z[:, :0], z)
    return View(model, site, gram, seed)
