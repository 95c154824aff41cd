"""Rows made into batches: padding, packing, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shallower.app.batching import loader
from shallower.app.data.readers import Augmented, ImageFormat, ImageReader, TextReader, TokenReader, packed
from shallower.app.data.rows import Labels, read_rows
from shallower.app.options import DataOptions
from shallower.app.tasks import LanguageModelling
from shallower.errors import DataError

Image = pytest.importorskip("PIL.Image")

TWO = Labels((), 2, {0: 0, 1: 1})


class Words:
    """A tokenizer of words of one letter, as Transformers calls one."""

    eos_token_id: int | None = 99

    def __call__(self, *texts: list[str], **options: Any) -> dict[str, Any]:
        ids = [[ord(w[0]) for w in " ".join(row).split()] for row in zip(*texts, strict=True)]
        if not options:
            return {"input_ids": ids}
        ids = [row[: options["max_length"]] for row in ids]
        longest = max(map(len, ids))
        return {"input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids])}


def test_text_batches_are_padded_to_their_longest_row_and_cut() -> None:
    rows = [{"text": "a b c d e", "label": 0}, {"text": "f", "label": 1}]
    (batch,) = loader(rows, TextReader(Words(), ("text",), "label", TWO, length=3), batch_size=8)
    assert batch["input_ids"].tolist() == [[97, 98, 99], [102, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_rows_without_labels_give_inputs_only() -> None:
    (texts,) = loader([{"text": "a b"}], TextReader(Words(), ("text",), "", None, length=3), batch_size=8)
    assert set(texts) == {"input_ids"}
    pictures = [{"image": np.zeros((4, 4), np.uint8)}] * 3
    (batch,) = loader(pictures, ImageReader("image", "", None, ImageFormat(1)), batch_size=8)
    assert batch.shape == (3, 1, 4, 4)


def test_augmented_pictures_are_moved_and_mirrored() -> None:
    column = np.zeros((16, 16), np.uint8)
    column[:, 5] = 255
    rows = [{"image": column, "label": 0}] * 40
    reader = ImageReader("image", "label", TWO, ImageFormat(1, mean=(0.0,), std=(1.0,)))
    torch.manual_seed(0)
    ((moved, labels),) = loader(rows, Augmented(reader), batch_size=40)
    assert moved.shape == (40, 1, 16, 16)
    assert labels.tolist() == [0] * 40
    where = {int(picture[0].sum(0).argmax()) for picture in moved}
    assert where <= {3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
    assert len(where) > 6


def test_shuffled_batches_repeat_with_the_seed() -> None:
    rows = [{"input_ids": [i, i]} for i in range(50)]
    orders = [
        [int(ids[0, 0]) for ids, _ in loader(rows, TokenReader("input_ids", 8, mapping=False), 1, seed=seed)]
        for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))


def test_texts_are_packed_into_blocks_with_an_end_between_them() -> None:
    rows = [{"text": "a b"}, {"text": " "}, {"text": "c d e f"}]
    assert [row["input_ids"] for row in packed(rows, "text", Words(), 4)] == [[97, 98, 99, 99], [100, 101, 102, 99]]


def test_texts_without_tokens_cannot_be_packed() -> None:
    with pytest.raises(DataError, match="fewer than two tokens"):
        packed([{"text": ""}], "text", Words(), 4)


def test_padding_of_token_rows_counts_for_nothing() -> None:
    batch = TokenReader("input_ids", length=3, pad=5)([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [7]}])
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [7, -100, -100]]


def test_pictures_of_several_sizes_need_one_named() -> None:
    rows = [{"image": Image.new("RGB", (6 + i, 8)), "label": i} for i in range(2)]
    with pytest.raises(DataError, match="--image-size"):
        ImageReader("image", "label", TWO)(rows)


def test_pictures_of_several_sizes_become_a_batch_of_one_size() -> None:
    rows = [{"image": Image.new("RGB", (6 + i, 8), (200 * i,) * 3), "label": i} for i in range(2)]
    pictures, labels = ImageReader("image", "label", TWO, ImageFormat(size=(8, 8)))(rows)
    assert pictures.shape == (2, 3, 8, 8)
    assert ((pictures.mean((1, 2, 3)) > 0).long() == labels).all()


def test_transformers_models_get_their_pictures_by_name() -> None:
    rows = [{"image": np.zeros((4, 4, 3), np.uint8), "label": 1}]
    batch = ImageReader("image", "label", TWO, mapping=True)(rows)
    assert isinstance(batch, dict)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"pixel_values": (1, 3, 4, 4), "labels": (1,)}


def test_the_format_of_pictures_is_read_from_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert ImageFormat.of(model).channels == 1
    assert ImageFormat.of(nn.Linear(3, 3)).channels is None
    model.image_size = 16  # type: ignore[assignment]
    assert ImageFormat.of(model).size == (16, 16)
    assert ImageFormat.of(model, 24).size == (24, 24)


def test_pictures_are_resized_cropped_and_normalised() -> None:
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    pixels = ImageFormat(size=(8, 8), crop=0.8)(picture)
    assert pixels.shape == (3, 8, 8)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[:, 4, 4], expected, atol=1e-5, rtol=0)


def test_grey_pictures_lie_between_minus_one_and_one() -> None:
    pixels = ImageFormat(channels=None)(np.array([[0, 255]], np.uint8))
    assert pixels.tolist() == [[[-1.0, 1.0]]]


def test_a_picture_with_other_channels_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(8, 8, 4\) does not fit a model with 3 channels"):
        ImageFormat()(np.zeros((8, 8, 4), np.uint8))


def test_real_pictures_and_sentences_are_read(data: Path) -> None:
    pictures = read_rows(str(data / "cifar10" / "test.parquet"), "image-classification", DataOptions(limit=8))
    assert pictures.labels is not None
    assert pictures.labels.names[:2] == ("airplane", "automobile")
    reader = ImageReader(pictures.columns.image, pictures.columns.label, pictures.labels)
    x, _ = next(iter(loader(pictures.train, reader, 8)))
    assert x.shape == (8, 3, 32, 32)
    sentences = read_rows(str(data / "sst2"), "text-classification", DataOptions(limit=5))
    assert (sentences.columns.text, sentences.columns.label) == (("sentence",), "label")
    assert [len(part) for part in (sentences.train, sentences.validation, sentences.test)] == [5, 5, 5]


def test_a_real_language_model_has_its_known_perplexity(data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k")
    tokens = str(data / "tinystories" / "train.parquet")
    rows = read_rows(tokens, "causal-lm", DataOptions(eval_data=tokens))
    first = loader(rows.train.select(range(100)), TokenReader(rows.columns.tokens, 512), 10)
    task = LanguageModelling()
    assert task.show(task.score(model, first)) == "4.086"
