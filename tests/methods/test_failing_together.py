"""Of two processes one fails in a pass over its data: both raise, whichever pass it is, and neither waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.processes import in_two_processes

pytestmark = pytest.mark.slow


class Failing(nn.Module):
    """A network that fails at one of its calls, whatever was copied of it in between."""

    left: float = float("inf")
    """Calls before the one that fails."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(6, 24) for _ in range(2))
        self.act = nn.ModuleList(nn.GELU() for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        Failing.left -= 1
        if Failing.left == -1:
            raise RuntimeError("this batch is broken")
        for up, act, down in zip(self.up, self.act, self.down, strict=True):
            x = x + down(act(up(x)))
        return x


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch.roll(1, -1))


WORKER = """
import sys
import torch
from torch import distributed
from shallower.core.processes import gathered
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze
from shallower.methods.tlc.till_layers_collapse import TillLayersCollapse
from shallower.training.recipe import Recipe
from tests.methods.test_failing_together import Failing, loss

way, step, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = Failing()
sites = find_sites(model, torch.zeros(2, 6))
rows = torch.randn(96, 6, generator=torch.Generator().manual_seed(rank))
batches = list(rows.split(32))


def score(model):
    return -float(loss(model, batches[0]))


def run():
    if way == "squeeze":
        squeeze(model, sites, batches, "params:60%", options=SqueezeOptions(round_to=8))
    elif way == "scored":
        squeeze(model, sites, batches, "drop:50%", score=score, options=SqueezeOptions(sensitivity=False))
    elif way == "sensitivity":
        method = LayerCollapse(model, sites, include=["*"])
        try:
            method.fit(batches, loss, Recipe(epochs=1, lr=1e-3), cpu=True)
        finally:
            method.detach()
    else:
        method = TillLayersCollapse(model, sites, criterion=way, batches=batches)
        try:
            method.plan(target="drop:50%", score=score, validation=batches, loss=loss)
        finally:
            method.detach()


failed = 0
for calls in range(0, most, step):
    Failing.left = calls if rank == 1 else float("inf")
    error = None
    try:
        run()
    except Exception as raised:
        error = raised
    outcomes = gathered(None if error is None else str(error))
    assert (outcomes[0] is None) == (outcomes[1] is None), outcomes
    assert error is None or "this batch is broken" in str(error), error
    failed += error is not None
    if gathered(Failing.left)[1] >= 0:
        break
assert failed > 1
"""


@pytest.mark.parametrize(
    ("way", "step", "most"),
    [
        ("squeeze", 2, 100),
        ("scored", 8, 100),
        ("sensitivity", 1, 9),  # the passes before the training
        ("loss", 1, 100),
        ("batchnorm", 1, 100),
        ("entropy", 1, 100),
    ],
)
def test_what_fails_in_one_process_fails_in_both(way: str, step: int, most: int, tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path, way, str(step), str(most))
