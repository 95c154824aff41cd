"""What a description of a tensor or a model may say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shallower.errors import CheckpointError
from shallower.saving.description import Description, Layout

LAYOUTS = {
    "contiguous": torch.randn(4, 6, 3, 3),
    "channels last": torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
    "channels last of one pixel": torch.randn(9, 6, 1, 1).as_strided((9, 6, 1, 1), (6, 1, 6, 6)),
    "transposed": torch.randn(6, 4).t(),
    "a scalar": torch.tensor(3.0),
    "nothing": torch.empty(0, 3),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_tensor_is_arranged_as_it_was(tensor: torch.Tensor) -> None:
    entry = Layout.of(tensor)
    arranged = entry.arranged(tensor.contiguous())
    assert torch.equal(arranged, tensor)
    assert arranged.stride() == tensor.stride()


def test_gaps_and_overlaps_in_memory_are_given_up() -> None:
    assert Layout.of(torch.randn(8, 8)[:, ::2]).strides == ()
    assert Layout.of(torch.randn(1, 8).expand(4, 8)).strides == ()


def described(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "float32", "shape": [4, 2]}
    empty = {"edits": [], "buffers": {}, "tied": [], "frozen": [], "training": {}, "files": []}
    empty["stock"] = {"name": "", "why": ""}
    return {"schema": "shallower", "version": 4, "source": "", "tensors": {"a": entry}, **empty, **changes}


def test_a_description_reads_what_it_writes() -> None:
    data = described(tied=[["a", "b"]], frozen=["a"], training={"epochs": 3}, files=["config.json"])
    assert Description.from_json(data).to_json() == data
    assert Description.from_json(data).names == {"a": "a", "b": "a"}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_order_of_an_earlier_version_is_read_as_strides(version: int) -> None:
    entry = {"dtype": "float32", "shape": [4, 6, 3, 3], "order": [0, 2, 3, 1]}
    read = Description.from_json(described(version=version, tensors={"a": entry}))
    assert read.tensors["a"].strides == LAYOUTS["channels last"].stride()
    assert Description.from_json({**read.to_json(), "version": 4}).tensors == read.tensors


@pytest.mark.parametrize("strides", [[1], [2, 2], [1, 3], [0, 1], [-2, 1], [2, 1, 1], [2.0, 1.0], "21"])
def test_strides_that_cannot_be(strides: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tensors\.a"):
        Description.from_json(described(tensors={"a": {"dtype": "float32", "shape": [4, 2], "strides": strides}}))


def test_edits_beyond_the_size_of_the_tensors_are_refused() -> None:
    norm = {"edit": "norm", "name": "a", "channels": 1 << 17}
    with pytest.raises(CheckpointError, match="channels = 131072 is larger than any tensor"):
        Description.from_json(described(edits=[norm]))
    wide = {"a": {"dtype": "float32", "shape": [1 << 17]}}
    assert Description.from_json(described(edits=[norm], tensors=wide)).edits == [norm]


def test_an_activation_is_wrapped_a_few_times_at_most() -> None:
    slope = {"edit": "slope", "name": "act"}
    assert len(Description.from_json(described(edits=[slope] * 8)).edits) == 8
    with pytest.raises(CheckpointError, match="wrapped more than 8 times"):
        Description.from_json(described(edits=[{**slope, "name": "act" + ".f" * i} for i in range(9)]))
