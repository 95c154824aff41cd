"""Batches of the rows: how many there are, and which are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from shallower.app.batching import TaskBatches, drawn_rows, loader
from tests.app.small import batches


def values(part: DataLoader[Any]) -> list[int]:
    return torch.cat(list(part)).flatten().tolist()


def rows(count: int) -> DataLoader[Any]:
    return loader(list(torch.arange(float(count))[:, None]), torch.stack, 4)


def given(count: int, more: int = 0) -> TaskBatches:
    """As many batches of four rows to train on, and some rows to choose and to report on."""
    train = loader(list(torch.arange(4.0 * count).view(count, 4, 1)), _itself, None, 0)
    test = rows(more) if more else None
    validation = rows(40)
    return TaskBatches(train, validation, test or validation, torch.zeros(4, 1))


def _itself(batch: Any) -> Any:
    return batch


def test_rows_that_are_drawn_keep_their_order_and_are_the_same_again() -> None:
    part = drawn_rows(rows(40), 10, seed=3)
    found = values(part)
    assert len(found) == 10
    assert found == sorted(set(found)) == values(drawn_rows(rows(40), 10, seed=3))
    assert found != values(drawn_rows(rows(40), 10, seed=4))
    assert len(values(drawn_rows(rows(40), 100, seed=3))) == 40


def test_batches_that_are_there_already_are_counted_by_their_rows() -> None:
    found = given(5, 12)
    assert found.counts == {"train": 20, "validation": 40, "test": 12}
    assert given(5).counts["test"] is None
    assert (found.size, found.example_rows, found.sample_size(10), found.sample_size(100)) == (4, 4, 12, 20)
    assert sum(len(batch) for batch in found.sample(10)) == 12
    assert len(values(drawn_rows(found.train, 8, seed=0))) == 8


def test_scores_are_taken_on_at_most_so_many_rows_and_that_is_said_once() -> None:
    few = given(5, 60).at_most(30).at_most(20)
    assert few.counts == {"train": 20, "validation": 20, "test": 20}
    assert few.remarks == (
        "scored on 20 of the 40 validation rows, drawn at random",
        "scored on 20 of the 60 test rows, drawn at random",
    )
    without = given(5).at_most(20)
    assert without.test is without.validation
    assert batches().at_most(1000).remarks == ()


def test_a_sample_is_the_same_in_every_call() -> None:
    data = TaskBatches(
        DataLoader(TensorDataset(torch.randn(40, 2)), 8, shuffle=True), rows(8), rows(8), torch.zeros(2, 2)
    )
    first = torch.cat([x for (x,) in data.sample(20)])
    assert len(first) == 24
    assert torch.equal(first, torch.cat([x for (x,) in data.sample(20)]))
