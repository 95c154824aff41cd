"""Reading data: files and folders of every kind, and the columns and classes found in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

from shallower.app.data.rows import Labels, read_rows  # noqa: E402
from shallower.app.options import DataOptions  # noqa: E402
from shallower.errors import DataError  # noqa: E402

REVIEWS = "text,label\n" + "".join(f"review {i},{'good' if i % 2 else 'bad'}\n" for i in range(20))


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for each test, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_csv_with_text_labels_is_read_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "reviews.csv", REVIEWS), "text-classification")
    assert (len(rows.train), len(rows.validation), rows.test) == (18, 2, None)
    assert rows.columns.text == ("text",)
    assert rows.labels is not None
    assert rows.labels.names == ("bad", "good")
    assert {row["text"] for row in rows.train}.isdisjoint(row["text"] for row in rows.validation)


def test_half_of_a_large_validation_part_becomes_the_test_part(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", REVIEWS)
    write(tmp_path / "validation.csv", "text,label\n" + "".join(f"other {i},good\n" for i in range(200)))
    rows = read_rows(str(tmp_path), "text-classification")
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (20, 100, 100)  # type: ignore[arg-type]
    assert {row["text"] for row in rows.test}.isdisjoint(row["text"] for row in rows.validation)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "text\n" + "".join(f"review {i}\n" for i in range(20)),
        "text,label\n" + "".join(f"review {i},{i / 7}\n" for i in range(20)),
        "text,label\n" + "".join(f"review {i},good\n" for i in range(20)),
    ],
    ids=["no column", "scores", "one class"],
)
def test_rows_without_classes_are_read_where_none_are_needed(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "reviews.csv", text)
    rows = read_rows(path, "text-classification", need_labels=False)
    assert (rows.labels, rows.columns.label, len(rows.train)) == (None, "", 18)


def test_a_column_of_classes_that_is_named_must_be_one(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", "text,mark\n" + "".join(f"review {i},{i / 7}\n" for i in range(20)))
    with pytest.raises(DataError, match="scores"):
        read_rows(path, "text-classification", DataOptions(label_column="mark"), need_labels=False)


def test_features_need_text_only(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "pairs.csv", "sentence1,sentence2,label\n" + "a,b,x\n" * 9), "feature-extraction")
    assert rows.columns.text == ("sentence1",)
    assert rows.labels is None


def test_the_held_out_rows_depend_on_the_seed_only(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", REVIEWS)
    held = [
        read_rows(path, "text-classification", DataOptions(held_out=0.3), seed=seed).validation["text"][:]
        for seed in (0, 0, 1)
    ]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("suffix", ["tsv", "json", "jsonl", "parquet"])
def test_every_table_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["a b", "c", "d"], "label": [0, 1, 1]})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "tsv":
        path.write_text("text\tlabel\na b\t0\nc\t1\nd\t1\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in table))
    rows = read_rows(str(path), "text-classification", DataOptions(eval_data=str(path)))
    assert rows.train[:] == rows.validation[:] == {"text": ["a b", "c", "d"], "label": [0, 1, 1]}
    assert rows.labels == Labels((), 2, {0: 0, 1: 1})


def test_files_of_a_folder_are_parts_by_their_names(tmp_path: Path) -> None:
    for name, count in (("train-00000", 5), ("dev", 2), ("my_test", 3)):
        write(tmp_path / f"{name}.csv", "sentence,label\n" + "word,0\n" * (count - 1) + "word,1\n")
    rows = read_rows(str(tmp_path), "text-classification")
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (5, 2, 3)


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("train", "text-train"):
        write(tmp_path / f"{name}.csv", REVIEWS)
    with pytest.raises(DataError, match=r"both text-train\.csv and train\.csv are its train part"):
        read_rows(str(tmp_path), "text-classification")


def test_a_test_part_without_labels_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,0\nb,1\n")
    write(tmp_path / "validation.csv", "text,label\na,0\n")
    write(tmp_path / "test.csv", "text,label\na,-1\n")
    assert read_rows(str(tmp_path), "text-classification").test is None


def test_pairs_of_sentences_are_found_and_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", "premise,hypothesis,note,label\n" + "a,b,c,0\nd,e,f,1\n" * 3)
    assert read_rows(path, "text-classification").columns.text == ("premise", "hypothesis")
    named = read_rows(path, "text-classification", DataOptions(text_column="note, premise"))
    assert named.columns.text == ("note", "premise")


def test_columns_that_cannot_be_guessed_are_an_error_that_lists_them(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.csv", "left,right,label\n" + "a,b,0\nc,d,1\n")
    with pytest.raises(DataError, match=r"which column holds the text\?.*left \(string\), right \(string\)"):
        read_rows(path, "text-classification")
    with pytest.raises(DataError, match=r"no column 'middle' as --text-column says; the columns are left"):
        read_rows(path, "text-classification", DataOptions(text_column="middle"))
    with pytest.raises(DataError, match=r"which column holds the picture\?"):
        read_rows(path, "image-classification")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("text,label\n", "no rows|cannot be read"),
        ("text,label\nonly one,0\n", "one row is too few"),
        ("text,label\na,0.5\nb,1.7\n", "holds 0.5, 1.7"),
        ("text,label\na,good\n,bad\n", "'text' is empty in 1 of 2 rows"),
        ("text,label\na,\nb,good\n", "'label' is empty in some rows"),
        ("text,label\na,-3\nb,1\n", "holds -3, 1"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "bad.csv", content)
    with pytest.raises(DataError, match=message) as raised:
        read_rows(path, "text-classification")
    assert "bad.csv" in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.csv", "no such file"),
        ("./nowhere", "no such file"),
        ("not a name", "no name on the hub"),
    ],
)
def test_missing_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source, "text-classification")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.parquet", "this is no parquet file")
    with pytest.raises(DataError, match=r"damaged\.parquet: the data cannot be read") as raised:
        read_rows(path, "text-classification")
    assert "\n" not in str(raised.value)


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.pkl' is not read; these are: \.csv"):
        read_rows(write(tmp_path / "rows.pkl", "x"), "text-classification")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder holds no data"):
        read_rows(str(tmp_path), "image-classification")


def test_an_unknown_class_in_the_validation_part_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "text,label\na,good\nb,bad\n")
    other = write(tmp_path / "b.csv", "text,label\na,fine\n")
    with pytest.raises(DataError, match=r"'fine' in the validation split"):
        read_rows(train, "text-classification", DataOptions(eval_data=other))


def test_limit_draws_rows_at_random(tmp_path: Path) -> None:
    path = write(tmp_path / "sorted.csv", "text,label\n" + "a,0\n" * 100 + "b,1\n" * 100)
    rows = read_rows(path, "text-classification", DataOptions(limit=40))
    assert len(rows.train) == 40
    assert len(rows.validation) == 20
    assert set(rows.train["label"]) == {0, 1}


def test_labels_must_fit_the_outputs_of_the_model() -> None:
    named = Labels(("cat", "dog"), 2, {0: 0, 1: 1})
    assert named.fitted(2, ("LABEL_0", "LABEL_1")) is named
    with pytest.raises(DataError, match=r"2 classes \(cat, dog\) and the model has 1000 outputs"):
        named.fitted(1000)
    numbers = Labels((), 2, {0: 0, 1: 1})
    assert numbers.fitted(10) is numbers
    with pytest.raises(DataError, match="2 classes and the model has 1 outputs"):
        numbers.fitted(1)


def test_labels_take_the_order_of_a_model_with_the_same_classes() -> None:
    labels = Labels(("no", "yes"), 2, {"no": 0, "yes": 1}).fitted(2, ("YES", "NO"))
    assert (labels("no"), labels("yes")) == (1, 0)


def test_names_of_classes_are_never_numbered_by_the_alphabet(tmp_path: Path) -> None:
    (tmp_path / "films.csv").write_text("text,label\n" + "good,pos\nbad,neg\n" * 10)
    labels = read_rows(str(tmp_path / "films.csv"), "text-classification").labels
    assert labels is not None
    assert labels.fitted(2, ("POS", "NEG")).numbers == {"pos": 0, "neg": 1}
    for names in ((), ("LABEL_0", "LABEL_1"), ("good", "bad")):
        with pytest.raises(DataError, match="nothing says which is which"):
            labels.fitted(2, names)


def test_numbers_written_as_text_are_numbers(tmp_path: Path) -> None:
    for name in ("2", "10"):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4, 4)).save(folder / f"{i}.png")
    labels = read_rows(str(tmp_path / "photos"), "image-classification").labels
    assert labels is not None
    assert (labels.names, labels.count, sorted(labels.numbers.values())) == ((), 11, [2, 10])


def test_language_data_is_read_as_text_or_as_tokens(tmp_path: Path) -> None:
    text = read_rows(write(tmp_path / "book.txt", "one line\nand another\n"), "causal-lm")
    assert text.columns.text == ("text",)
    tokens = write(tmp_path / "ids.jsonl", '{"input_ids": [1, 2]}\n{"input_ids": [3]}\n')
    assert read_rows(tokens, "causal-lm").columns.tokens == "input_ids"


def image_folder(folder: Path) -> str:
    for name, value in (("dark", 10), ("light", 240)):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (6 + i, 8), (value, value, value)).save(folder / name / f"{i}.png")
    return str(folder)


def test_an_image_folder_names_its_classes(tmp_path: Path) -> None:
    rows = read_rows(image_folder(tmp_path), "image-classification", DataOptions(held_out=0.3))
    assert rows.labels is not None
    assert rows.labels.names == ("dark", "light")
    assert [np.asarray(row["image"]).mean() > 100 for row in rows.train] == [row["label"] == 1 for row in rows.train]


@pytest.mark.parametrize("names", [("image", "label"), ("x_train", "y_train"), ("train_images", "train_labels")])
def test_arrays_are_read_by_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    x = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)
    np.savez(tmp_path / "arrays.npz", **{names[0]: x, names[1]: np.array([0, 1, 2, 1])})
    rows = read_rows(str(tmp_path / "arrays.npz"), "image-classification")
    assert rows.labels is not None
    assert rows.labels.count == 3
    row = next(iter(rows.validation))
    assert row["image"].dtype == np.uint8
    assert (row["image"] == x).all((1, 2)).any()


def test_parts_of_an_archive_are_found_by_their_names(tmp_path: Path) -> None:
    x, y = np.zeros((6, 2, 2, 3), np.float32), np.array([0, 1] * 3)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    rows = read_rows(str(tmp_path / "a.npz"), "image-classification", DataOptions(held_out=0.5))
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (3, 3, 2)


def test_arrays_of_different_length_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2, 2)), y=np.zeros(4, np.int64))
    with pytest.raises(DataError, match=r"same number of rows: x \(3, 2, 2\), y \(4,\)"):
        read_rows(str(tmp_path / "a.npz"), "image-classification")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}, {}], dtype=object), y=np.zeros(2))
    with pytest.raises(DataError, match="the arrays cannot be read"):
        read_rows(str(tmp_path / "a.npz"), "image-classification")
