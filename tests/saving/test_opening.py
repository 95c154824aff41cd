"""Open dimensions have names by their sizes, and are tried with sizes of their own."""

from __future__ import annotations

import pytest
import torch

from shallower.errors import ExportError
from shallower.saving.opening import check_opened, enlarged, shapes_of, sizes_to_check, symbol_names, wanted

IDS = torch.ones(1, 9, dtype=torch.long)


def test_auto_opens_the_batch_and_the_length_of_tokens() -> None:
    assert wanted({"ids": IDS, "pixels": torch.ones(1, 3, 4, 4), "step": torch.tensor(1)}, "auto") == {
        "ids": {0: "batch", 1: "length"},
        "pixels": {0: "batch"},
        "step": {},
    }
    assert wanted(IDS, None) is None


def test_lengths_that_may_differ_have_names_of_their_own() -> None:
    names = {"0": {0: "batch", 1: "length"}, "1": {0: "batch", 1: "length"}}
    titles = {"0": "query", "1": "document"}
    apart = {"0": {0: "s0", 1: "s1"}, "1": {0: "s2", 1: "s3"}}
    found = symbol_names(apart, names, titles, ["length"])
    assert found == {"s0": "batch", "s1": "query_length", "s2": "batch", "s3": "document_length"}
    tied = {"0": {1: "s1"}, "1": {1: "s1"}}
    assert symbol_names(tied, names, titles, ["length"]) == {"s1": "length"}
    assert symbol_names(apart, names, titles)["s3"] == "length"


def test_sizes_of_one_are_doubled_and_every_name_is_tried_with_its_own_size() -> None:
    inputs = enlarged((IDS, IDS))
    assert shapes_of(inputs) == "2 x 9"
    opened = {"0": {0: "batch", 1: "a"}, "1": {0: "batch", 1: "b"}}
    assert list(map(shapes_of, sizes_to_check(inputs, opened))) == ["2 x 9", "3 x 6 and 3 x 5"]
    assert len(list(sizes_to_check(inputs, {}))) == 1


def test_what_the_model_fixes_cannot_be_asked_for() -> None:
    names = {"x": {0: "batch"}}
    check_opened(names, {}, "auto")
    with pytest.raises(ExportError, match=r"input x: the model fixes dimension 0 \(batch\)"):
        check_opened(names, {}, names)
