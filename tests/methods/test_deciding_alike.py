"""Two processes with data of their own decide alike, and as one process does that has all of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.recalibration import recalibrate
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.dropout.ordering import by_elimination
from shallower.methods.tlc.till_layers_collapse import TillLayersCollapse
from tests.processes import in_two_processes

pytestmark = pytest.mark.slow


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12), nn.BatchNorm1d(12)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 3)).double().eval()


def batches() -> list[Tensor]:
    """Those of the first process vary less than those of the second."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 6, generator=generator, dtype=torch.float64)
    return [*(0.2 * x[:48]).split(16), *(3.0 * x[48:]).split(16)]


def decided(given: Sequence[Tensor]) -> dict[str, Any]:
    """Everything that is decided by measuring on these batches."""
    model = network()
    sites = find_sites(model, given[0] if given else torch.zeros(2, 6, dtype=torch.float64))
    found: dict[str, Any] = {"order": by_elimination(model, sites, given)}
    collapsing = LayerCollapse(model, sites, include="*")
    found["sensitivity"] = collapsing.sensitivity(given)
    for module in collapsing.activations.values():
        nn.init.ones_(module.slope)
    found["collapsed"] = lines_of(collapsing.plan(batches=given).entries)
    collapsing.detach()
    for criterion in ("batchnorm", "entropy"):
        linear = TillLayersCollapse(model, sites, criterion=criterion, line="best", batches=given)
        found[criterion] = linear.rank(), lines_of(linear.plan(count=2).entries)
        linear.detach()
    recalibrate(model, given)
    found["statistics"] = dict(model.named_buffers())
    return found


def lines_of(entries: Sequence[Any]) -> Mapping[str, Any]:
    return {entry.site.name: (entry.slopes, entry.offsets) for entry in entries}


WORKER = """
import sys
import torch
from torch import distributed
from tests.methods.test_deciding_alike import batches, decided

distributed.init_process_group("gloo")
rank = distributed.get_rank()
own = {"halves": [batches()[:3], batches()[3:]], "one has all": [[], batches()]}[sys.argv[1]]
torch.save(decided(own[rank]), f"{sys.argv[2]}/{rank}")
"""


@pytest.mark.parametrize("way", ["halves", "one has all"])
def test_two_processes_decide_as_one_with_all_data(way: str, tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path, way, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, decided(batches()), rtol=1e-9, atol=1e-12)
