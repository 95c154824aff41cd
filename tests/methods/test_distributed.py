"""LayerCollapse where training is compiled, or runs in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from tests.processes import in_two_processes

pytestmark = pytest.mark.slow


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act, self.fc3 = nn.Linear(8, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act(self.fc2(F.relu(self.fc1(x)))))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return list(zip(x.split(8), (x[:, 0] > 0).long().split(8), strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # from inductor
def test_compiled_training_step_is_the_eager_one() -> None:
    results = []
    for compiled in (False, True):
        model = network()
        method = LayerCollapse(model, find_sites(model, torch.randn(2, 8)), granularity="channel")
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(method.param_groups(0.01), lr=0.1)
        for x, labels in batches():
            method.before_step()
            optimizer.zero_grad()
            method.loss(lambda run=run, x=x, labels=labels: F.cross_entropy(run(x), labels)).backward()
            optimizer.step()
            method.after_step(0.1)
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(results[0], results[1])


WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional as F
from tests.methods.test_distributed import batches, network
from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.training import Recipe

way, out = sys.argv[1:]
model = network()
method = LayerCollapse(model, find_sites(model, torch.randn(2, 8)), granularity="channel", slope_lr=0.05)
own = batches()

if way == "fit":
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    stages = method.fit(own, loss, Recipe(epochs=3, lr=1e-2), checkpoint=out + ".stages", cpu=True)
    assert len(stages) == 2
    rank, state = dist.get_rank(), dict(model.state_dict())
else:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if way == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(method.param_groups(0.01), lr=0.1)
    for x, labels in own[rank::2]:
        method.before_step()
        optimizer.zero_grad()
        method.loss(lambda: F.cross_entropy(wrapped(x), labels)).backward()
        optimizer.step()
        method.after_step(0.1)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
save_file({k: v.detach().contiguous() for k, v in state.items()}, f"{out}.{rank}")
"""


def by_two_processes(way: str, folder: Path) -> list[dict[str, Tensor]]:
    """The state of the model that each of two processes ends with."""
    in_two_processes(WORKER, folder, way, folder / "state")
    return [load_file(folder / f"state.{rank}") for rank in (0, 1)]


def alone() -> dict[str, Tensor]:
    """The same steps in one process: each on the two batches that the processes take."""
    model = network()
    method = LayerCollapse(model, find_sites(model, torch.randn(2, 8)), granularity="channel", slope_lr=0.05)
    optimizer = torch.optim.SGD(method.param_groups(0.01), lr=0.1)
    both = batches()
    for (x, labels), (x2, labels2) in zip(both[::2], both[1::2], strict=True):
        method.before_step()
        optimizer.zero_grad()
        inputs, targets = torch.cat([x, x2]), torch.cat([labels, labels2])
        method.loss(lambda inputs=inputs, targets=targets: F.cross_entropy(model(inputs), targets)).backward()
        optimizer.step()
        method.after_step(0.1)
    return dict(model.state_dict())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(way: str, tmp_path: Path) -> None:
    first, second = by_two_processes(way, tmp_path)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, alone())


def test_stages_run_in_two_processes_and_end_equal(tmp_path: Path) -> None:
    first, second = by_two_processes("fit", tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    slopes = [tensor for name, tensor in first.items() if name.endswith("slope")]
    assert len(slopes) == 2
    assert all(torch.equal(slope, torch.ones_like(slope)) for slope in slopes)
