"""What belongs to a model is saved, or the model is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.errors import CheckpointError
from shallower.saving.slots import plain_name, slots_of, unwrapped, without_weights


def refuses(model: nn.Module, directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        sh.save(model, directory / "out")
    assert not list(directory.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_parts_are_refused(tmp_path: Path) -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    quantised: Any = torch.ao.quantization.quantize_dynamic(mlp, dtype=torch.qint8)
    refuses(nn.Sequential(nn.LayerNorm(4), quantised), tmp_path, r"1\.0.*would be lost. Save the model before")
    refuses(quantised, tmp_path, "would be lost")


def test_extra_state_is_refused_because_it_would_be_pickled(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return object()

    refuses(nn.Sequential(nn.ReLU(), Extra(2, 2)), tmp_path, "1: a Extra keeps extra state")


def test_a_module_that_saves_more_than_its_tensors_is_refused(tmp_path: Path) -> None:
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "scale"] = torch.ones(1)

    refuses(nn.Sequential(Packed(2, 2)), tmp_path, "0: a Packed keeps scale outside of its parameters")


def test_a_lazy_module_is_refused(tmp_path: Path) -> None:
    refuses(nn.Sequential(nn.LazyLinear(3)), tmp_path, r"0\.weight: its module is lazy and has not run yet")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("pieces", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    refuses(model, tmp_path, "pieces: a nested tensor cannot be saved")
    model.register_buffer("pieces", torch.eye(3).to_sparse())
    refuses(model, tmp_path, r"pieces: a Tensor \(torch.sparse_coo\) cannot be saved")


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    refuses(nn.Linear(2, 2).to("meta"), tmp_path, "weight: it is on the meta device")


class Keeps(nn.Module):
    """Keeps a tensor of its forward, as models do for auxiliary losses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.features = self.up(x).relu()
        self.kept.append(self.features)
        return self.down(self.features)


def test_a_model_that_keeps_tensors_of_its_training_is_saved_and_loaded_into(tmp_path: Path) -> None:
    model, fresh, x = Keeps(), Keeps(), torch.randn(3, 4)
    model(x).sum().backward()
    fresh(x).sum().backward()
    sh.save(model, tmp_path / "out")
    assert torch.equal(sh.load(tmp_path / "out", model=fresh)(x), model(x))


def test_the_names_of_a_wrapped_part_are_those_without_the_wrapper() -> None:
    compiled: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    assert list(slots_of(nn.Sequential(nn.Linear(2, 2), compiled))) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert plain_name("a._orig_mod.b", "weight") == "a.b.weight"
    assert unwrapped(compiled) is compiled._orig_mod


def test_a_skeleton_shares_no_weights_with_its_model() -> None:
    model = nn.Linear(2, 2)
    skeleton = without_weights(model)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
