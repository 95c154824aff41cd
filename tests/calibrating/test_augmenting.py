"""More token batches out of the same ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower.calibrating.augmenting import augment_tokens
from shallower.errors import FitError

CLS, SEP, PAD = 101, 102, 0


def batches(rows: list[list[int]], size: int = 2) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(rows), size):
        part = [[CLS, *row, SEP] for row in rows[start : start + size]]
        longest = max(map(len, part))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def unpadded(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)]


sentences = st.lists(st.lists(st.integers(1000, 1099), min_size=1, max_size=9), min_size=2, max_size=9)


@given(rows=sentences, seed=st.integers(0, 99))
def test_the_given_batches_come_first_and_unchanged(rows, seed):
    given_ = batches(rows)
    for before, after in zip(given_, augment_tokens(given_, seed=seed), strict=False):
        assert torch.equal(before["input_ids"], after["input_ids"])
        assert torch.equal(before["attention_mask"], after["attention_mask"])


@given(rows=sentences, seed=st.integers(0, 99))
def test_every_row_keeps_the_tokens_that_begin_and_end_it(rows, seed):
    for batch in augment_tokens(batches(rows), seed=seed):
        for row in unpadded(batch):
            assert row[0] == CLS
            assert row[-1] == SEP
            assert CLS not in row[1:]


@given(rows=sentences, seed=st.integers(0, 99))
def test_without_a_vocabulary_no_token_is_new(rows, seed):
    seen = {token for row in rows for token in row} | {CLS, SEP}
    assert {t for batch in augment_tokens(batches(rows), seed=seed) for row in unpadded(batch) for t in row} <= seen


@given(rows=sentences)
def test_there_are_five_times_as_many_tokens(rows):
    found = sum(len(row) - 2 for batch in augment_tokens(batches(rows)) for row in unpadded(batch))
    assert found == 5 * sum(map(len, rows))


def test_tokens_are_replaced_by_those_of_the_vocabulary():
    found = augment_tokens(batches([[1000] * 50] * 4), vocabulary=range(2000, 2100), replaced=0.5, joined=1)
    tokens = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in found])
    new = (tokens >= 2000).float().mean()
    assert 0.25 < new < 0.35  # half of three fifths


def test_joined_rows_are_cut_to_the_longest_allowed():
    found = augment_tokens(batches([[1000] * 50] * 8), joined=4, longest=64)
    assert max(len(row) for batch in found for row in unpadded(batch)) == 64


def test_joined_rows_may_be_as_long_as_the_longest_one_given():
    ids = torch.arange(2 * 300).reshape(2, 300)
    assert max(batch["input_ids"].shape[1] for batch in augment_tokens([{"input_ids": ids}])) == 300


def test_labels_are_left_out():
    ids = torch.arange(40).reshape(4, 10)
    assert all("labels" not in batch for batch in augment_tokens([{"input_ids": ids, "labels": torch.zeros(4)}]))


def test_the_seed_decides():
    rows = [[1000 + i + j for j in range(5)] for i in range(8)]
    same = [augment_tokens(batches(rows), seed=3) for _ in range(2)]
    other = augment_tokens(batches(rows), seed=4)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*same, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(same[0], other, strict=True))


def test_rows_without_a_mask_count_whole():
    found = augment_tokens([{"input_ids": torch.arange(12).view(3, 4)}])
    assert bool(found[0]["attention_mask"].all())


def test_token_types_of_single_texts_stay_zero():
    given_ = [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches([[7, 8, 9]] * 4)]
    for batch in augment_tokens(given_):
        assert torch.equal(batch["token_type_ids"], torch.zeros_like(batch["input_ids"]))


def test_pairs_of_texts_are_refused():
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(FitError, match="single texts"):
        augment_tokens([{"input_ids": ids, "token_type_ids": ids}])


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [torch.zeros(2, 3)],
        [{"pixel_values": torch.zeros(2, 3)}],
        [{"input_ids": torch.zeros(2, 3)}],
        [{"input_ids": torch.zeros(2, 3, dtype=torch.int64), "pixel_values": torch.zeros(2)}],
    ],
)
def test_other_batches_are_refused(bad):
    with pytest.raises(FitError):
        augment_tokens(bad)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(FitError, match="replaced"):
        augment_tokens(batches([[1000, 1001]] * 3), replaced=2.0)
