"""Lists lose entries; what was done to those that stay is done again to the right ones."""

from __future__ import annotations

import pytest
from torch import nn

from shallower.errors import CheckpointError
from shallower.modules.edits import Resize, edits, encoded, perform, replay
from shallower.modules.prepared.absent import Absent
from shallower.modules.prepared.lists import Entries, numbering


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


def test_numbers_that_only_some_entries_hold_follow_too() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"part": nn.Linear(1, 1)}) for _ in range(5)))
    for i in (0, 2, 3):
        model[i]["part"].index = i
    perform(model, Absent("4.part", cache=4))
    assert numbering(model) == [("part", "cache"), ("part", "index")]
    perform(model, Entries("", (0, 3, 4)))
    assert (model[1]["part"].index, model[2]["part"].cache) == (1, 2)


@pytest.mark.parametrize(
    "edit", [Entries("list", (1, 1)), Entries("list", (2, 0)), Entries("list", (1, 4)), Entries("list.0", (0,))]
)
def test_entries_that_there_are_not_are_refused(edit: Entries) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        replay(lists(), [edit])
