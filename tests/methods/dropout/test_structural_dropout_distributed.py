"""Structural Dropout where training is compiled, or runs in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from shallower.finding.kinds import find_sites
from shallower.methods.dropout.structural_dropout import StructuralDropout
from tests.processes import in_two_processes

pytestmark = pytest.mark.slow


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.fc1, self.act, self.fc2 = nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.norm(self.conv(x))))
        return self.fc2(self.act(self.fc1(x.mean((2, 3)))))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def method_for(model: nn.Module, published: bool = False) -> StructuralDropout:
    sites = find_sites(model.eval(), torch.randn(2, 1, 6, 6))
    model.train()
    make = StructuralDropout.as_published if published else StructuralDropout
    return make(model, sites)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    return list(zip(x.split(8), (x.mean((1, 2, 3)) > 0).long().split(8), strict=True))


@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_compiled_passes_are_the_eager_ones_and_few_graphs_do_for_all_widths() -> None:
    counter = CompileCounter()
    results = []
    for compiled in (False, True):
        model = network()
        method = method_for(model)
        run = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        optimizer = torch.optim.SGD(method.param_groups(0.01), lr=0.1)
        for x, labels in batches() * 2:
            method.before_step()
            optimizer.zero_grad()

            def closure(run: nn.Module = run, x: Tensor = x, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
                logits = run(x)
                return F.cross_entropy(logits, labels), logits

            method.loss(closure).backward()
            optimizer.step()
            method.after_step(0.1)
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 6


WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional as F
from tests.methods.dropout.test_structural_dropout_distributed import batches, method_for, network

way, out = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
model = network()
method = method_for(model, published=way == "published")
torch.manual_seed(rank)  # what the processes draw for themselves must not matter
if way == "sharded":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
else:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(method.param_groups(0.01), lr=0.1)
seen = []
for x, labels in batches()[rank::2]:
    method.before_step()
    optimizer.zero_grad()
    method.loss(lambda: F.cross_entropy(wrapped(x), labels)).backward()
    optimizer.step()
    method.after_step(0.1)
whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.named_parameters()}
state = {k: v.detach().contiguous() for k, v in whole.items()}
save_file(state | {"drawn": torch.tensor([list(d.values()) for d in method._drawn])}, f"{out}.{rank}")
"""


@pytest.mark.parametrize("way", ["published", "defaults", "sharded"])
def test_two_processes_draw_the_same_widths_and_end_equal(way: str, tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path, way, tmp_path / "state")
    first, second = (load_file(tmp_path / f"state.{rank}") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
