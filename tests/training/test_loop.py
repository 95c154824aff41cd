"""The built-in training loop: it learns, resumes exactly, and stops where it was told to."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shallower as sh
from shallower.core.files import read_state, write_state
from shallower.errors import TrainingError
from shallower.training import Checkpoint, History, Recipe, train
from shallower.training.trainable import Trainable
from tests.processes import in_two_processes


class Halves(nn.Module):
    """A small classifier with everything that has a state: dropout, BatchNorm, biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def problem(rows: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(problem(), batch_size=16, shuffle=True)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module) -> float:
    x, y = problem().tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


class InterruptionError(Exception):
    """Stands for the loss of the machine."""


def interrupting(after: int):  # type: ignore[no-untyped-def]
    calls = 0

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise InterruptionError
        return cross_entropy(model, batch)

    return loss


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_learns_and_reports_each_epoch() -> None:
    model = Halves()
    history = train(model, loader(), cross_entropy, Recipe(epochs=40, lr=3e-2), score=accuracy)
    assert len(history.losses) == len(history.scores) == len(history.seconds) == 40
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert history.scores[-1] > 0.85


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path, optimizer: str, precision: str) -> None:
    recipe = Recipe(epochs=4, lr=1e-2, warmup=0.2, optimizer=optimizer, precision=precision)  # type: ignore[arg-type]
    whole, resumed, path = Halves(), Halves(), tmp_path / "run.safetensors"
    expected = train(whole, loader(), cross_entropy, recipe, score=accuracy)
    with pytest.raises(InterruptionError):
        train(resumed, loader(), interrupting(15), recipe, score=accuracy, checkpoint=Checkpoint(path, every=2))
    resumed = Halves()
    history = train(resumed, loader(), cross_entropy, recipe, score=accuracy, checkpoint=Checkpoint(path, every=2))
    assert history.resumed == 14
    assert equal(whole, resumed)
    assert history.losses == pytest.approx(expected.losses, rel=1e-6)
    assert history.scores == expected.scores


def test_a_generator_of_the_loader_resumes_too(tmp_path: Path) -> None:
    def own() -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(problem(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))

    recipe, path = Recipe(epochs=3, lr=1e-2), tmp_path / "run.safetensors"
    whole, resumed = Halves(), Halves()
    train(whole, own(), cross_entropy, recipe)
    with pytest.raises(InterruptionError):
        train(resumed, own(), interrupting(8), recipe, checkpoint=path)
    resumed = Halves()
    train(resumed, own(), cross_entropy, recipe, checkpoint=path)
    assert equal(whole, resumed)


def test_a_finished_checkpoint_is_only_loaded(tmp_path: Path) -> None:
    recipe, path = Recipe(epochs=2, lr=1e-2), tmp_path / "run.safetensors"
    first, second = Halves(), Halves()
    train(first, loader(), cross_entropy, recipe, checkpoint=path)
    history = train(second, loader(), interrupting(0), recipe, checkpoint=path)
    assert equal(first, second)
    assert history.resumed == 12


def test_channels_last_moments_survive_a_checkpoint(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        return layers.to(memory_format=torch.channels_last)

    images = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])) for _ in range(6)]
    recipe, path = Recipe(epochs=1, lr=1e-2), tmp_path / "run.safetensors"
    whole, resumed = network(), network()
    train(whole, images, cross_entropy, recipe)
    with pytest.raises(InterruptionError):
        train(resumed, images, interrupting(3), recipe, checkpoint=Checkpoint(path, every=3))
    resumed = network()
    train(resumed, images, cross_entropy, recipe, checkpoint=Checkpoint(path, every=3))
    assert equal(whole, resumed)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), checkpoint=path)
    with pytest.raises(TrainingError, match=r"another run \(lr differ"):
        train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=2e-2), checkpoint=path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), checkpoint=path)
    with pytest.raises(TrainingError, match="does not fit this run"):
        train(nn.Linear(8, 2), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), checkpoint=path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), checkpoint=path)


def test_state_files_keep_nested_values_and_shared_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {"a": [1, 0.1, None, "x"], 3: (shared, shared), "b": {"c": shared[::2]}, "d": True}
    write_state(tmp_path / "s.safetensors", state, error=TrainingError)
    back = read_state(tmp_path / "s.safetensors", error=TrainingError)
    assert back["a"] == state["a"]
    assert back["d"] is True
    assert torch.equal(back[3][0], shared)
    assert torch.equal(back[3][1], shared)
    assert torch.equal(back["b"]["c"], shared[::2])


def test_the_floor_stops_and_gives_back_the_last_good_model() -> None:
    scores = iter([0.9, 0.8, 0.3, 0.9])
    states: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(scores)

    model = Halves()
    history = train(model, loader(), cross_entropy, Recipe(epochs=4, lr=1e-2), score=score, floor=0.5)
    assert history.stopped
    assert history.scores == [0.9, 0.8, 0.3]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in model.state_dict().items())


def test_a_floor_never_reached_gives_back_the_first_model() -> None:
    model, before = Halves(), Halves()
    history = train(model, loader(), cross_entropy, Recipe(epochs=2, lr=1e-2), score=lambda _: 0.0, floor=0.5)
    assert history.stopped
    assert equal(model, before)


class Recorder(Trainable):
    """A method that writes down what the loop asks of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[str] = []
        self.lrs: list[float] = []

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "weight_decay": weight_decay}]

    def before_step(self) -> None:
        self.calls.append("before")

    def loss(self, closure) -> Tensor:  # type: ignore[no-untyped-def]
        self.calls.append("loss")
        value: Tensor = closure() + 1.0
        return value

    def after_step(self, lr: float | None = None) -> None:
        assert lr is not None
        self.calls.append("after")
        self.lrs.append(lr)

    def state_dict(self) -> dict[str, object]:
        return {"lrs": self.lrs}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.lrs = list(state["lrs"])


def test_a_method_is_asked_before_in_and_after_each_step() -> None:
    model = Halves()
    method = Recorder(model)
    recipe = Recipe(epochs=2, lr=1e-2, warmup=0.25)
    plain = train(Halves(), loader(), cross_entropy, recipe)
    history = train(model, loader(), cross_entropy, recipe, method=method)
    assert method.calls == ["before", "loss", "after"] * 12
    assert method.lrs == pytest.approx([1e-2 * recipe.factor(step, 12) for step in range(12)])
    assert history.losses[0] == pytest.approx(plain.losses[0] + 1.0, abs=0.02)


def test_the_state_of_a_method_is_in_the_checkpoint(tmp_path: Path) -> None:
    recipe, path = Recipe(epochs=2, lr=1e-2), tmp_path / "run.safetensors"
    whole, stopped, resumed = (Recorder(Halves()) for _ in range(3))
    train(whole.model, loader(), cross_entropy, recipe, method=whole)
    with pytest.raises(InterruptionError):
        train(stopped.model, loader(), interrupting(8), recipe, method=stopped, checkpoint=path)
    train(resumed.model, loader(), cross_entropy, recipe, method=resumed, checkpoint=path)
    assert resumed.calls == ["before", "loss", "after"] * 6
    assert resumed.lrs == whole.lrs


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("step", [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0.5, 1, 1, 0.933, 0.75, 0.5, 0.25, 0.067]),
    ],
)
def test_schedules_rise_and_fall(schedule: str, expected: list[float]) -> None:
    recipe = Recipe(epochs=1, lr=1.0, schedule=schedule, warmup=0.25)  # type: ignore[arg-type]
    assert [recipe.factor(step, 8) for step in range(8)] == pytest.approx(expected, abs=1e-3)


def test_mixed_precision_leaves_no_trace_on_the_model() -> None:
    model = Halves()
    before = set(vars(model))
    train(model, loader(), cross_entropy, Recipe(epochs=1, lr=1e-2, precision="bf16"))
    assert set(vars(model)) == before
    assert model(torch.randn(4, 8)).dtype == torch.float32
    assert model.training


def test_score_may_copy_a_model_that_trains_in_mixed_precision() -> None:
    x = problem().tensors[0]

    def zeroed(model: nn.Module) -> float:
        duplicate = copy.deepcopy(model)
        for parameter in duplicate.parameters():
            nn.init.zeros_(parameter)
        out = duplicate(x)
        assert out.dtype == torch.float32
        return float(out.detach().abs().max())

    history = train(Halves(), loader(), cross_entropy, Recipe(epochs=2, lr=1e-2, precision="bf16"), score=zeroed)
    assert history.scores == [0.0, 0.0]


def test_an_accelerator_of_the_caller_keeps_its_precision() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2, precision="no"))
    assert accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def one_shot() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(2, 8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batches", "message"), [([], "no batches"), (one_shot(), "one-shot"), ({1, 2}.__class__, "no length")]
)
def test_batches_that_cannot_be_trained_on_are_refused(batches: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(Halves(), batches, cross_entropy, Recipe(epochs=1, lr=1e-2))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"lr": 0.0}, {"warmup": 1.0}, {"epochs": -1}, {"clip": 0.0}])
def test_a_recipe_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=next(iter(change))):
        dataclasses.replace(Recipe(epochs=1, lr=1e-2), **change)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        train(Halves(), loader(), lambda model, batch: cross_entropy(model, batch) / 0, Recipe(epochs=1, lr=1e-2))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]).sum(1), r"shape \(16,\); return a scalar"),
        (lambda model, batch: cross_entropy(model, batch).item(), r"is a float; .* without \.item"),
        (lambda model, batch: cross_entropy(model, batch).detach(), "does not depend on any parameter"),
        (lambda model, batch: model(batch[0][:, :3]).sum(), "step 1: the model or the loss fails on this batch"),
        (lambda _, batch: batch["labels"], "step 1: the model or the loss fails on this batch"),
    ],
)
def test_a_wrong_loss_is_one_sentence(loss: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(Halves(), loader(), loss, Recipe(epochs=1, lr=1e-2))
    model = Halves()
    with pytest.raises(TrainingError, match=message):
        train(model, loader(), loss, Recipe(epochs=1, lr=1e-2), method=Recorder(model))


def test_data_that_are_not_finite_are_named_and_not_the_learning_rate() -> None:
    batches = list(loader())
    batches[3][0][2, 5] = float("nan")
    with pytest.raises(TrainingError, match="batch of step 4 contains NaN") as told:
        train(Halves(), batches, cross_entropy, Recipe(epochs=1, lr=1e-2))
    assert "learning rate" not in str(told.value)


def test_batches_that_end_early_or_cannot_be_read_are_named() -> None:
    class Short(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(list(super().__iter__())[:-1])

    class Damaged(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield self[0]
            raise OSError("the disk is gone")

    with pytest.raises(TrainingError, match="ended after 5, and their length is 6"):
        train(Halves(), Short(loader()), cross_entropy, Recipe(epochs=1, lr=1e-2))
    with pytest.raises(TrainingError, match=r"batch 2 cannot be read: .*the disk is gone"):
        train(Halves(), Damaged(loader()), cross_entropy, Recipe(epochs=1, lr=1e-2))


def test_a_training_leaves_the_processs_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = Halves.__new__(Halves)
    nn.Module.__init__(model)
    model.layers = nn.Sequential(nn.Linear(8, 2), nn.Dropout())
    torch.manual_seed(7)
    train(model, loader(), cross_entropy, Recipe(epochs=1, lr=1e-2, seed=3))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("generator", [True, False])
def test_a_loader_yields_the_same_order_after_a_training_and_after_a_read_one(tmp_path: Path, generator: bool) -> None:
    def order(checkpoint: Path) -> list[Tensor]:
        torch.manual_seed(11)
        own = torch.Generator().manual_seed(5) if generator else None
        model = Halves()
        batches = DataLoader(problem(), batch_size=16, shuffle=True, generator=own)
        train(model, batches, cross_entropy, Recipe(epochs=2, lr=1e-2), checkpoint=checkpoint)
        return [x for x, _ in batches]

    trained, read = (order(tmp_path / "run.safetensors") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(trained, read, strict=True))


def test_every_module_is_in_its_own_mode_afterwards() -> None:
    model = Halves()
    model.layers[1].eval()
    train(model, loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), score=accuracy)
    assert [module.training for module in model.layers] == [True, False, True, True, True]


def test_a_model_that_keeps_what_it_computed_can_be_squeezed_afterwards() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept = [self.down(self.act(self.up(x)))]
            return self.kept[0]

    model, x = Keeping(), problem().tensors[0][:4]
    method = sh.LayerCollapse(model, sh.find_sites(model, x), arrive_in=3)
    train(model, loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), method=method)
    model.eval()
    small = sh.apply(model, method.plan(), x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_floor_without_a_score_is_refused() -> None:
    with pytest.raises(TrainingError, match="score="):
        train(Halves(), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2), floor=0.5)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        train(Halves().requires_grad_(False), loader(), cross_entropy, Recipe(epochs=1, lr=1e-2))


def test_history_counts_nothing_before_training() -> None:
    assert train(Halves(), loader(), cross_entropy, Recipe(epochs=0, lr=1e-2)) == History()


TWO_PROCESSES = """
import sys
import torch
from safetensors.torch import save_file
from tests.training.test_loop import Halves, cross_entropy, loader
from shallower.training import Recipe, train

folder = sys.argv[1]
model = Halves()
train(model, loader(), cross_entropy, Recipe(epochs=3, lr=1e-2), cpu=True, checkpoint=folder + "/run.safetensors")
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
save_file({k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k},
          f"{folder}/rank{rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(tmp_path: Path) -> None:
    in_two_processes(TWO_PROCESSES, tmp_path, tmp_path)
    assert (tmp_path / "rank0.safetensors").read_bytes() == (tmp_path / "rank1.safetensors").read_bytes()
    assert read_state(tmp_path / "run.safetensors", error=TrainingError)["position"] == 9


def test_with_patience_training_ends_in_its_best_state(tmp_path: Path) -> None:
    scores = [0.5, 0.7, 0.6, 0.9, 0.8, 0.7, 0.6, 0.95]
    states: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return scores[len(states) - 1]

    model, recipe, path = Halves(), Recipe(epochs=7, lr=1e-2, patience=3), tmp_path / "run.safetensors"
    history = train(model, loader(), cross_entropy, recipe, score=score, checkpoint=path)
    assert (history.before, history.scores, history.best, history.stopped) == (0.5, scores[1:7], 0.9, True)
    assert all(torch.equal(tensor, states[3][name]) for name, tensor in model.state_dict().items())
    again = Halves()
    assert train(again, loader(), cross_entropy, recipe, score=score, checkpoint=path).stopped
    assert equal(model, again)


def test_with_patience_a_training_that_gains_nothing_changes_nothing() -> None:
    values = iter([1.0, 0.5, float("nan")])
    model = Halves()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = train(model, loader(), cross_entropy, Recipe(epochs=2, lr=1e-2, patience=5), score=lambda _: next(values))
    assert (history.best, history.stopped) == (1.0, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_patience_needs_a_score_and_resumes_with_its_count(tmp_path: Path) -> None:
    recipe = Recipe(epochs=9, lr=1e-2, patience=2)
    with pytest.raises(TrainingError, match="patience"):
        train(Halves(), loader(), cross_entropy, recipe)
    scores = iter([0.5, 0.4, 0.3])
    path = tmp_path / "run.safetensors"
    with pytest.raises(InterruptionError):
        train(Halves(), loader(), interrupting(8), recipe, score=lambda _: next(scores), checkpoint=path)
    history = train(Halves(), loader(), cross_entropy, recipe, score=lambda _: next(scores), checkpoint=path)
    assert (history.before, history.scores, history.stopped) == (0.5, [0.4, 0.3], True)
