"""Healing that finds its own recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shallower.errors import TrainingError
from shallower.training.guiding import Healing
from shallower.training.healing import heal
from shallower.training.matching import Matching
from shallower.training.recipe import Checkpoint
from tests.processes import in_two_processes
from tests.training.test_healing import data, error, squeezed


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_without_a_recipe_the_network_comes_nearer() -> None:
    dense, small, _ = squeezed()
    before = error(small, dense)
    state = torch.get_rng_state()
    history = heal(small, dense, data(), cpu=True)
    assert history.lr is not None
    assert history.before is not None
    assert history.best is not None
    assert history.best > history.before
    assert error(small, dense) < 0.5 * before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("lr", [None, 1.0])
def test_the_network_is_never_farther_than_before_on_the_rows_held_out(lr: float | None) -> None:
    dense, small, _ = squeezed()
    noise = [10 * torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    whole = weights(small)
    history = heal(small, dense, noise, Healing(passes=2, lr=lr), cpu=True)
    assert history.before is not None
    assert history.best is not None
    assert history.best >= history.before
    if history.best == history.before:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in small.state_dict().items())


def test_a_rate_is_looked_for_until_one_gains() -> None:
    dense, small, _ = squeezed()
    found = heal(small, dense, data(), Healing(passes=40, patience=40, lr=1e-2), cpu=True)
    assert found.before is not None
    # it is near its optimum: only a small rate brings it nearer still
    again = heal(small, dense, data(), Healing(passes=1), cpu=True)
    assert again.lr is not None
    assert again.lr < 1e-2
    assert again.best >= found.best  # type: ignore[operator]


def test_it_stops_where_the_rows_held_out_gain_no_longer() -> None:
    dense, small, _ = squeezed()
    history = heal(small, dense, data(2), Healing(passes=400, lr=1e-2, patience=2), cpu=True)
    assert history.stopped
    assert len(history.scores) < 400
    assert history.best == max(history.scores)
    assert history.scores[-1] < history.best


def test_the_rate_is_found_unless_it_is_given() -> None:
    dense, small, _ = squeezed()
    found = heal(small, dense, data(), Healing(passes=1), cpu=True).lr
    assert found is not None
    assert 1e-4 < found <= 1e-2
    assert heal(small, dense, data(), Healing(passes=1, lr=2e-4), cpu=True).lr == 2e-4


class Normed(nn.Module):
    """A network whose BatchNorm was measured on other data than the few rows of the healing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x).mean((2, 3))
        return y


def normed() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    dense = Normed().train()
    with torch.no_grad():
        for _ in range(60):
            dense(torch.randn(32, 3, 8, 8) * 3 + 1)
    dense.eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    return dense, small, [torch.randn(2, 3, 8, 8) * 3 + 1 for _ in range(20)]


def test_batchnorm_keeps_its_statistics_unless_told() -> None:
    dense, small, batches = normed()
    before = weights(small)
    history = heal(small, dense, batches, Healing(passes=1, lr=1e-4), cpu=True)
    assert history.best is not None
    assert torch.equal(small.layers[1].running_mean, before["layers.1.running_mean"])  # type: ignore[index, union-attr]
    dense, small, batches = normed()
    told = Healing(passes=1, lr=1e-4, batchnorm="training")
    history = heal(small, dense, batches, told, cpu=True)
    # batches of two rows: the statistics that they leave are worse, and the guard goes back
    assert history.scores[0] < history.before  # type: ignore[operator]
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


class StoppedError(Exception):
    """Stands for an interruption."""


def test_an_interrupted_healing_goes_on_with_the_same_result(tmp_path: Path) -> None:
    dense, small, _ = squeezed()
    options = Healing(passes=3, seed=2)
    heal(small, dense, data(), options, cpu=True)
    whole = weights(small)
    path = Checkpoint(tmp_path / "heal.safetensors", every=7)

    dense, small, _ = squeezed()
    forward, calls = small.forward, 0

    def interrupted(x: Tensor) -> Any:
        nonlocal calls
        calls += path.file.exists()
        if calls > 20:
            raise StoppedError
        return forward(x)

    small.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="StoppedError"):
        heal(small, dense, data(), options, cpu=True, checkpoint=path)
    dense, small, _ = squeezed()
    history = heal(small, dense, data(), options, cpu=True, checkpoint=path)
    assert history.resumed > 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in small.state_dict().items())


def test_the_checkpoint_of_another_healing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heal.safetensors"
    dense, small, _ = squeezed()
    start = copy.deepcopy(small)
    heal(small, dense, data(), Healing(passes=1), cpu=True, checkpoint=path)
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.up.weight[0, 0] += 1  # type: ignore[union-attr, index, operator]
    for changed, batches, options in (
        (other, data(), Healing(passes=1)),
        (start, data(11), Healing(passes=1)),
        (start, data(), Healing(passes=1, patience=9)),
    ):
        with pytest.raises(TrainingError, match="another healing"):
            heal(changed, dense, batches, options, cpu=True, checkpoint=path)
    another = Matching(output_of=lambda output: output[..., :1])
    with pytest.raises(TrainingError, match="another healing"):
        heal(start, dense, data(), Healing(passes=1), matching=another, cpu=True, checkpoint=path)
    history = heal(start, dense, data(), Healing(passes=1), cpu=True, checkpoint=path)
    assert history.resumed > 0
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), start.parameters(), strict=True))


def test_a_loader_that_shuffles_is_read_in_the_same_order_each_time() -> None:
    rows = TensorDataset(torch.cat(data()))
    results = []
    for _ in range(2):
        dense, small, _ = squeezed()
        heal(small, dense, DataLoader(rows, 16, shuffle=True, collate_fn=_first), Healing(passes=1), cpu=True)
        results.append(weights(small))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def _first(rows: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([row for (row,) in rows])


def test_time_and_rows_are_limited() -> None:
    dense, small, _ = squeezed()
    history = heal(small, dense, data(), Healing(passes=1000, patience=1000, seconds=1.0), cpu=True)
    assert sum(history.seconds) < 5
    counted = 0

    def inputs_of(batch: Tensor) -> Tensor:
        nonlocal counted
        counted += len(batch)
        return batch

    heal(small, dense, data(), Healing(passes=1, rows=40, lr=1e-3), inputs_of=inputs_of, cpu=True)
    assert counted == 48


def test_a_score_takes_the_place_of_the_rows_held_out() -> None:
    dense, small, _ = squeezed()
    scored = iter(range(1000))
    history = heal(
        small, dense, data(), Healing(passes=3, lr=1e-3, patience=9), score=lambda _: -next(scored), cpu=True
    )
    assert (history.before, history.best, history.stopped) == (0, 0, False)
    fresh = squeezed()[1]
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), fresh.parameters(), strict=True))


def test_sites_are_matched_too() -> None:
    dense, small, sites = squeezed()
    before = error(small, dense)
    heal(small, dense, data(), Healing(passes=4), Matching("sites", sites), cpu=True)
    assert error(small, dense) < before


def test_there_must_be_rows_to_hold_out() -> None:
    dense, small, _ = squeezed()
    with pytest.raises(TrainingError, match="two batches"):
        heal(small, dense, [torch.randn(1, 6)], cpu=True)
    with pytest.raises(TrainingError, match="no batches"):
        heal(small, dense, [], cpu=True)
    with pytest.raises(TrainingError, match="one-shot"):
        heal(small, dense, iter(data()), cpu=True)


TWO_PROCESSES = """
import torch
import torch.distributed as dist
from shallower.saving.vision import repair_torchvision
repair_torchvision()
from shallower.certifying.certify import certify
from shallower.training.guiding import Healing
from shallower.training.healing import heal
from tests.training.test_healing import data, error, squeezed

dist.init_process_group("gloo")
dense, small, _ = squeezed()
before = error(small, dense)
torch.manual_seed(dist.get_rank())
history = heal(small, dense, data(), Healing(passes=2), cpu=True)
assert error(small, dense) < before
both = [None, None]
own = [history.scores, history.lr, *(tensor.sum().item() for tensor in small.state_dict().values())]
dist.all_gather_object(both, own)
assert both[0] == both[1], both
rows = data()[dist.get_rank()::2]
found = certify(dense, small, rows)
assert found.rows == 12 * 16
dist.all_gather_object(both, found)
assert both[0] == both[1], both
"""


@pytest.mark.slow
def test_two_processes_heal_and_certify_alike(tmp_path: Path) -> None:
    in_two_processes(TWO_PROCESSES, tmp_path)
