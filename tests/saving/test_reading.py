"""Files of a saved directory that are incomplete, damaged or elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shallower as sh
from shallower.errors import CheckpointError
from shallower.saving.reading import read_buffers, read_config, read_description, read_weights


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("scale", torch.ones(2), persistent=False)
    sh.save(model, tmp_path / "out", max_shard_size=100)
    return tmp_path / "out"


def test_all_parts_are_read(saved: Path) -> None:
    description = read_description(saved)
    assert set(read_weights(saved, description)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(read_buffers(saved, description)["scale"], torch.ones(2))
    assert read_config(saved, description.source) is None


def test_a_directory_that_is_missing_names_what_an_interrupted_save_left(saved: Path) -> None:
    saved.rename(saved.with_name(".out[1].previous-0123"))
    with pytest.raises(CheckpointError, match=r"there is no such directory; an interrupted save left"):
        read_description(saved.with_name("out[1]"))


@pytest.mark.parametrize("path", ["a\x00b", "x" * 5000, "\udcff"])
def test_a_name_that_no_directory_can_have(path: str) -> None:
    with pytest.raises(CheckpointError):
        read_description(Path(path))
    with pytest.raises(CheckpointError):
        sh.save(nn.Linear(2, 2), path)


def test_a_tensor_of_another_shape_than_described(saved: Path) -> None:
    description = read_description(saved)
    shard = next(path for path in saved.glob("model-*") if "0.weight" in load_file(path))
    save_file({**load_file(shard), "0.weight": torch.ones(2, 2)}, shard)
    with pytest.raises(CheckpointError, match=r"tensor 0\.weight: .* has it as float32 \[2, 2\]"):
        read_weights(saved, description)


def test_a_pipe_in_the_place_of_the_description_is_not_waited_for(saved: Path) -> None:
    (saved / "shallower.json").unlink()
    os.mkfifo(saved / "shallower.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_description(saved)


def test_a_config_is_an_object(saved: Path) -> None:
    for config in ([], None, "text"):
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="not the config of a model"):
            read_config(saved, "transformers:BertModel")


def test_the_index_names_files_beside_it(saved: Path) -> None:
    description = read_description(saved)
    index: Any = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"]["0.weight"] = "../model-00001-of-00002.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        read_weights(saved, description)
