"""All sites squeezed in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.sweeping import Sweep
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from tests.processes import in_two_processes


class Network(nn.Module):
    """A head of three layers, the middle one of which is consumer and producer, behind a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 20), nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        out: Tensor = self.fc3(torch.tanh(self.fc2(torch.relu(self.fc1(x)))))
        return out


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 8, generator=generator) for _ in range(count)]


def error(dense: nn.Module, small: nn.Module) -> float:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((dense(x) - small(x)).square().mean())


def test_the_plan_applied_is_the_network_that_the_sweep_ended_with() -> None:
    model = network()
    sites = find_sites(model, batches()[0])
    plan, small = Sweep(model, sites, Calibration(batches())).plan({s.name: s.width // 2 for s in sites})
    with torch.no_grad():
        torch.testing.assert_close(apply(model, plan, batches()[0])(batches()[0]), small(batches()[0]))
    assert [len(entry.kept) for entry in plan.entries] == [12, 10, 8]
    assert all(entry.error is not None and 0 < entry.error < 1 for entry in plan.entries)


def test_fitting_the_producers_too_comes_nearer_to_the_dense_network() -> None:
    model = network()
    sites = find_sites(model, batches()[0])
    widths = {s.name: s.width // 3 for s in sites}
    found = [
        Sweep(model, sites, Calibration(batches(), SqueezeOptions(producers=producers))).plan(widths)[1]
        for producers in (False, True)
    ]
    assert error(model, found[1]) < 0.8 * error(model, found[0])


def test_batches_in_another_order_each_time_are_read_once() -> None:
    model = network()
    sites = find_sites(model, batches()[0])
    loader = DataLoader(torch.cat(batches()), batch_size=64, shuffle=True)  # type: ignore[arg-type]
    _, small = Sweep(model, sites, Calibration(loader)).plan({s.name: s.width - 2 for s in sites})
    assert error(model, small) < 0.01


WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.sweeping import Sweep
from tests.methods.squeezing.test_sweeping import batches, network

dist.init_process_group("gloo")
rank = dist.get_rank()
model = network()
sites = find_sites(model, batches()[0])
own = batches()[rank::2][: 4 - rank]
sweep = Sweep(model, sites, Calibration(own))
plan, small = sweep.plan({s.name: s.width // 2 for s in sites})
curves = {f"curve {n}": torch.tensor([c[k] for k in sorted(c)]) for n, c in sweep.errors.items()}
state = {k: v.contiguous() for k, v in small.state_dict().items()}
save_file(state | curves | {e.site.name: e.fates for e in plan.entries}, f"{sys.argv[1]}/{rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_with_different_data_make_one_plan(tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


UNEQUAL = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.squeeze import squeeze

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
sites = find_sites(model, torch.randn(2, 4))
torch.manual_seed(rank + 1)
batches = [torch.randn((512, 3)[rank], 4) for _ in range(2)]
plan = squeeze(model, sites, batches, "params:60%")
plan.save(f"{sys.argv[1]}/{rank}")
"""


@pytest.mark.slow
def test_a_process_with_hardly_any_rows_takes_part_in_every_sum(tmp_path: Path) -> None:
    in_two_processes(UNEQUAL, tmp_path, tmp_path)
    plans = [Plan.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert plans[0].to_json() == plans[1].to_json()
    # the rows of both together are enough to fit the producers too
    assert all(entry.fit is not None and entry.fit.producer is not None for entry in plans[0].entries)
