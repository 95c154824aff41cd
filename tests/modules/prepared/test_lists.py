"""Lists lose entries; what was done to those that stay is done again to the right ones."""

from __future__ import annotations

import pytest
from torch import nn

from shallower.errors import CheckpointError
from shallower.modules.edits import Resize, edits, encoded, perform, replay
from shallower.modules.prepared.lists import Entries


def lists() -> nn.ModuleDict:
    """A list and a dict of layers, each of another size."""
    sizes = (2, 3, 4, 5)
    return nn.ModuleDict(
        {
            "list": nn.ModuleList(nn.Linear(1, size) for size in sizes),
            "dict": nn.ModuleDict({f"layer_{size}": nn.Linear(1, size) for size in sizes}),
        }
    )


def test_entries_that_stay_are_numbered_anew_and_keep_what_was_done_to_them() -> None:
    model = lists()
    perform(model, Resize("list.3", "linear", 1, 7, True, (1, 1), (1, 1), (0, 0), (1, 1), 1))
    perform(model, Entries("list", (1, 3)))
    perform(model, Entries("dict", (0, 2)))
    perform(model, Resize("list.0", "linear", 1, 6, True, (1, 1), (1, 1), (0, 0), (1, 1), 1))
    perform(model, Entries("list", (1,)))
    assert [layer.out_features for layer in model["list"]] == [7]
    assert {name: layer.out_features for name, layer in model["dict"].items()} == {"layer_2": 2, "layer_3": 4}
    again = replay(lists(), [encoded(edit) for edit in edits(model)])
    assert [layer.out_features for layer in again["list"]] == [7]
    assert {name: layer.out_features for name, layer in again["dict"].items()} == {"layer_2": 2, "layer_3": 4}


@pytest.mark.parametrize(
    "edit", [Entries("list", (1, 1)), Entries("list", (2, 0)), Entries("list", (1, 4)), Entries("list.0", (0,))]
)
def test_entries_that_there_are_not_are_refused(edit: Entries) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        replay(lists(), [edit])
