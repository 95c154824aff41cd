"""A calibration set is read once, and every pass sees what was read."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from shallower.core.batches import Batches
from shallower.core.trees import tensors
from shallower.errors import DataError, SiteError


class Noise(Dataset[Tensor]):
    """Augments: every reading is another one."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        if index >= 6:
            raise IndexError
        return torch.randn(3)


def all_of(batches: Batches) -> list[list[Any]]:
    return [[t.tolist() for t in tensors((batch.inputs, batch.mask))] for batch in batches]


@pytest.mark.parametrize("most", [None, 0, 40])
def test_every_pass_reads_what_was_read_first(most: int | None) -> None:
    loader = DataLoader(Noise(), batch_size=2, shuffle=True)
    batches = Batches.read(loader, most=most)
    assert len(batches) == 3
    assert batches.rows == 6
    assert all_of(batches) == all_of(batches)
    assert Batches.read(batches) is batches
    assert Batches.read(loader).digest != batches.digest


Pair = namedtuple("Pair", ["x", "y"])

KINDS: dict[str, Any] = {
    "tensor": torch.randn(2, 3),
    "labelled": (torch.randn(2, 3), torch.ones(2)),
    "dict": {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3), "flag": True},
    "three": (torch.randn(2, 3), torch.ones(2), torch.eye(3).to_sparse()),
    "named": [Pair(torch.randn(2, 3), torch.ones(2)), 0],
    "half": torch.randn(2, 3).to(torch.bfloat16),
}


@pytest.mark.parametrize("most", [None, 0])
@pytest.mark.parametrize("raw", KINDS.values(), ids=KINDS)
def test_every_kind_of_batch_is_kept_as_it_is(raw: Any, most: int | None) -> None:
    kept, spilled = Batches.read([raw]), Batches.read([raw], most=most)
    assert kept.digest == spilled.digest
    for a, b in zip(tensors(kept[0].inputs), tensors(spilled[0].inputs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.to_dense(), b.to_dense())
    assert type(kept[0].inputs) is type(spilled[0].inputs)
    assert (kept[0].mask is None) == ("attention_mask" not in raw if isinstance(raw, dict) else True)


@pytest.mark.parametrize("most", [None, 0])
def test_what_a_model_writes_into_its_inputs_stays_out_of_the_next_pass(most: int | None) -> None:
    batches = Batches.read([torch.ones(2)], most=most)
    next(tensors(batches[0].inputs)).zero_()
    assert all_of(batches) == [[[1, 1]]]


def test_any_other_number_or_order_is_another_digest() -> None:
    x = torch.arange(6.0).view(2, 3)
    sets = [[x], [x.view(3, 2)], [x.int()], [x, x], [x.flip(0)], [{"a": x}], [{"b": x}], [(x, 1, 2)], [(x, 1, 3)], []]
    digests = {Batches.read(batches, lambda b: b).digest for batches in sets}
    assert len(digests) == len(sets)


def test_a_loader_may_hand_out_the_same_memory_again() -> None:
    class Loader:
        def __iter__(self) -> Any:
            buffer = torch.zeros(1)
            for _ in range(3):
                yield buffer
                buffer += 1

    assert all_of(Batches.read(Loader())) == [[[0]], [[1]], [[2]]]


def test_a_data_set_is_read_by_its_length() -> None:
    assert len(Batches.read(TensorDataset(torch.randn(4, 2, 3)), lambda batch: batch[0])) == 4


def test_what_is_spilled_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batches = Batches.read([torch.ones(2)], most=0)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    del batches
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter([torch.ones(2)]), r"one-shot iterator.*list\(batches\)"),
        (torch.ones(2, 3), r"single Tensor.*pass \[batch\]"),
        ({"input_ids": torch.ones(2, 3)}, "single dict"),
        (3, "a int, which cannot be iterated over"),
        ([3], "not a int"),
        ([["text"]], "tuple without tensors"),
        ([{"labels": torch.ones(2)}], "dict without tensors"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_remedy(batches: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        Batches.read(batches)


def test_what_fails_on_a_batch_names_the_batch() -> None:
    with pytest.raises(DataError, match="batch 2 cannot be read"):
        Batches.read(Rows())
    with pytest.raises(SiteError, match="`inputs_of` or `mask_of` fails on batch 1: KeyError: 'x'"):
        Batches.read([{"y": torch.ones(1)}], lambda batch: batch["x"])
    with pytest.raises(SiteError, match="the mask is a list"):
        Batches.read([torch.ones(1)], mask_of=lambda _: [1])  # type: ignore[arg-type,return-value]


class Rows:
    def __iter__(self) -> Any:
        yield torch.ones(1)
        raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("most", [None, 0])
def test_batches_know_whose_their_masks_are_when_some_are_read_again(most: int | None) -> None:
    raw = [{"x": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}] * 2
    for mask_of, own in ((None, False), (lambda batch: batch["attention_mask"], True)):
        batches = Batches.read(raw, mask_of=mask_of, most=most)
        again = Batches.read([batches[0]], most=most)
        assert [batch.own_mask for batch in (*batches, *again, again[0].on("cpu"))] == [own] * 4
        assert all_of(again) == all_of(batches)[:1]
