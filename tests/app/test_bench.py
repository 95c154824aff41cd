"""Timing a result against its original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.app.bench import bench, example_of, loaded_with, pair
from shallower.app.models import LoadedModel
from shallower.errors import DataError, ModelError


def make_wide(width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    """A factory, as a person writes one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)), torch.randn(3, 8)


WIDE = f"{__name__}:make_wide"


@pytest.fixture
def collapsed(tmp_path: Path) -> Path:
    model, x = make_wide()
    sh.save(sh.apply(model, sh.Plan.collapse(sh.find_sites(model, x)), x), tmp_path / "out")
    return tmp_path / "out"


def test_both_are_timed_at_every_setting_and_the_threads_stay(collapsed: Path) -> None:
    before, after = pair(collapsed, WIDE)
    examples = [example_of(before, collapsed, batch=rows, length=1) for rows in (1, 5)]
    threads = torch.get_num_threads()
    timings = bench(before.model, after, examples, [1], rounds=2)
    assert [(t.batch, t.threads) for t in timings] == [(1, 1), (5, 1)]
    assert all(t.before > 0 and t.after > 0 and t.speedup > 0 for t in timings)
    assert torch.get_num_threads() == threads


def test_code_is_imported_only_when_it_is_named(collapsed: Path) -> None:
    for load in (lambda: pair(collapsed), lambda: loaded_with(str(collapsed))):
        with pytest.raises(ModelError, match="only imported when you say so"):
            load()
    assert sum(p.numel() for p in loaded_with(str(collapsed), WIDE).model.parameters()) == 8 * 8 + 8


def test_inputs_of_a_factory_are_repeated_to_the_batch() -> None:
    model, x = make_wide()
    example = example_of(LoadedModel(model, "", None, {"x": (x, 1)}), Path(), batch=5, length=1)
    assert isinstance(example, dict)
    assert torch.equal(example["x"][0], x[[0, 1, 2, 0, 1]])
    assert example["x"][1] == 1


def test_a_shape_takes_the_place_of_the_models_own_inputs() -> None:
    model, x = make_wide()
    loaded = LoadedModel(model, "", None, x)
    assert example_of(loaded, Path(), batch=2, length=1, shape="4,8").shape == (2, 4, 8)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="--shape"):
        example_of(loaded, Path(), batch=2, length=1, shape="four")
