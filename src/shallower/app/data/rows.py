"""DATA on the command line: a hub name or local files, read with the `datasets` library.

    rows = read_rows("reviews.csv", "text-classification")
    rows.train, rows.validation, rows.columns.text, rows.labels.names

reading.py opens the files, batching.py makes batches of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shallower.app.data.reading import IMAGE_NAMES, LABEL_NAMES, datasets_library, numbers_by_alphabet, parts_of
from shallower.app.options import DataOptions, TaskName
from shallower.core.text import listing
from shallower.errors import DataError

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
_TEXTS = ("text", "sentence", "content", "review", "document", "comment", "tweet")
_MOST_CLASSES = 100_000
_ENOUGH = 200
"""Rows of a validation part of which one half may be the test part, where the data has none."""
_UNNAMED = re.compile(r"LABEL_\d+")
"""What Transformers calls a class that nobody named."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the data a task reads; those it does not need are empty.

    Attributes:
        text: one column of text, or two for pairs of sentences.
        label: the class.
        image: the picture, or an array.
        tokens: token numbers that are read as they are, instead of text.
    """

    text: tuple[str, ...] = ()
    label: str = ""
    image: str = ""
    tokens: str = ""


@dataclass(frozen=True)
class Labels:
    """The classes of the data, and the number each one has for the model.

    Attributes:
        names: of the classes, in the order of the data; empty where the data holds bare numbers.
        count: how many classes there are; with bare numbers, the largest plus one.
        numbers: value in the data -> output of the model.
        alphabetical: the data only names its classes; their numbers are their order in the alphabet.
    """

    names: tuple[str, ...]
    count: int
    numbers: Mapping[Any, int]
    alphabetical: bool = False

    def __call__(self, value: Any) -> int:
        """The model's number for a value of the label column."""
        return self.numbers[value]

    def fitted(self, outputs: int, names: Sequence[str] = ()) -> Labels:
        """These labels, for a model with so many outputs; where the model names the same classes, in the model's order.

        Raises:
            DataError: the classes do not fit the model, or nothing says which output stands for which of them.
        """
        if self.count > outputs or (self.names and self.count != outputs):
            classes = ""
            if self.names:
                classes = f" ({listing(self.names)})"
            raise DataError(
                f"the data has {self.count} classes{classes} and the model has {outputs} outputs: "
                "use a model whose head was made for this data, or another label column"
            )
        if not self.names or (not names and not self.alphabetical):
            return self
        own, theirs = list(map(str.casefold, self.names)), list(map(str.casefold, names))
        if set(own) == set(theirs):
            return replace(self, numbers={value: theirs.index(own[number]) for value, number in self.numbers.items()})
        if all(map(_UNNAMED.fullmatch, names)) and not self.alphabetical:
            return self
        theirs_told = "the model does not name its own"
        if names:
            theirs_told = f"the model's are {listing(names)}"
        raise DataError(
            f"the classes of the data are {listing(self.names)}, {theirs_told}, and nothing says which is which: put "
            "the model's class numbers into the label column, or the names into the model's config "
            "(id2label)"
        )


@dataclass(frozen=True)
class Rows:
    """What the data holds, before anything is known of the model.

    Attributes:
        train: to train and calibrate on; a sequence of rows, each a mapping from column to value.
        validation: to choose on.
        test: to report and to certify on; half of a large validation part where the data has no labelled test part,
            None where that is small.
        columns: what is read of each row.
        labels: the classes; None where the task or the data has none.
        remarks: what people should know of the data.
    """

    train: Any
    validation: Any
    test: Any | None
    columns: Columns
    labels: Labels | None
    remarks: tuple[str, ...] = ()

    def unlabelled(self) -> Rows:
        """The same rows without their classes."""
        return replace(self, columns=replace(self.columns, label=""), labels=None)

    @property
    def parts(self) -> dict[str, Any]:
        """The three parts by name; None for a test part that is not there."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def read_rows(
    source: str,
    task: TaskName,
    options: DataOptions = DataOptions(),
    *,
    seed: int = 0,
    need_labels: bool = True,
) -> Rows:
    """Read data and find the columns that a task needs.

        read_rows("reviews.csv", "text-classification", DataOptions(label_column="stars"))

    Args:
        source: a file (csv, tsv, json, jsonl, parquet, txt, npz), a folder of such files whose names say train,
            validation or test, a folder of images with one folder for each class, a folder written by
            `save_to_disk`, or a name on the hub ("imdb", "glue:sst2" with its configuration).
        task: what the rows are for.
        options: the validation data, the columns, and how many rows.
        seed: of the rows held out and drawn.
        need_labels: whether data without classes, or with scores in their place, is an error.

    Raises:
        DataError: the data cannot be read, is empty, or lacks a column; the error names what was found.
    """
    parts = parts_of(source)
    if options.eval_data:
        others = parts_of(options.eval_data)
        parts["validation"] = next(others[name] for name in ("validation", "test", "train") if name in others)
    for name, part in parts.items():
        if not len(part):
            raise DataError(f"{source}: there are no rows in its {name} split")
    if "train" not in parts:
        raise DataError(
            f"{source}: there is no training split among {', '.join(parts)}; name the file to train on, "
            "and give the other one with --eval-data"
        )
    optional = not need_labels and not options.label_column
    columns = _columns(parts["train"], source, task, options, optional)
    labels, remarks = None, []
    if columns.label:
        try:
            labels = _labels(parts, columns.label, source)
        except DataError as error:
            if not optional:
                raise
            remarks.append(f"the labels were not used: {error}")
    if labels is None or (optional and labels.count < 2):
        columns, labels = replace(columns, label=""), None
    for name in list(parts):
        _check_columns(parts[name], f"{source} ({name})", columns)
    if "validation" not in parts:
        parts["train"], parts["validation"] = _split_rows(parts["train"], source, options.held_out, seed)
    if "test" not in parts and len(parts["validation"]) >= _ENOUGH:
        parts["validation"], parts["test"] = _split_rows(parts["validation"], source, 0.5, seed)
    if options.limit is not None:
        for name, part in parts.items():
            parts[name] = _sampled_rows(part, options.limit, seed)
    return Rows(parts["train"], parts["validation"], parts.get("test"), columns, labels, tuple(remarks))


def _split_rows(part: Any, source: str, held_out: float, seed: int) -> tuple[Any, Any]:
    """A part of the rows and what is held out of it, drawn at random."""
    if len(part) < 2:
        raise DataError(f"{source}: one row is too few to train on some and validate on others")
    order = np.random.default_rng(seed).permutation(len(part))
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    train, validation = np.sort(order[count:]), np.sort(order[:count])
    return part.select(train, keep_in_memory=True), part.select(validation, keep_in_memory=True)


@dataclass(frozen=True)
class _Features:
    """The columns of the data: which of them are of a kind, and which have a name that says what they are."""

    kinds: Mapping[str, Any]
    source: str

    def __str__(self) -> str:
        def kind(feature: Any) -> str:
            return str(getattr(feature, "dtype", None) or type(feature).__name__).replace("large_string", "string")

        return listing(f"{name} ({kind(feature)})" for name, feature in self.kinds.items())

    def of_kind(self, kind: type) -> list[str]:
        return [name for name, feature in self.kinds.items() if isinstance(feature, kind)]

    @property
    def texts(self) -> list[str]:
        values = self.of_kind(datasets_library().Value)
        return [name for name in values if self.kinds[name].dtype in ("string", "large_string")]

    def named(self, names: Sequence[str]) -> str:
        """The first column with one of these names, or ""."""
        for name in self.kinds:
            if name.lower() in names:
                return name
        return ""

    def given(self, name: str, option: str) -> str:
        """The column that an option names, if it names one."""
        if name and name not in self.kinds:
            raise DataError(f"{self.source}: there is no column {name!r} as {option} says; the columns are {self}")
        return name

    def only(self, kind: type, names: Sequence[str]) -> str:
        """The one column of a kind; where there are several or none, the first with one of these names, or ""."""
        found = self.of_kind(kind)
        if len(found) == 1:
            return found[0]
        return self.named(names)

    def unclear(self, what: str, option: str) -> DataError:
        return DataError(f"{self.source}: which column holds {what}? Say {option}; the columns are {self}")


def _columns(part: Any, source: str, task: TaskName, options: DataOptions, optional: bool) -> Columns:
    """The columns that a task reads: those that an option names, else those whose kind or name says so."""
    datasets = datasets_library()
    features = _Features(part.features, source)
    if task == "causal-lm":
        if not options.text_column and "input_ids" in features.kinds:
            return Columns(tokens="input_ids")
        texts = _texts(features, features.given(options.text_column, "--text-column"), "")
        if len(texts) != 1:
            raise features.unclear("the text, or input_ids", "--text-column")
        return Columns(text=texts)
    label = ""
    if task not in ("feature-extraction", "image-feature-extraction"):
        label = features.given(options.label_column, "--label-column") or features.only(
            datasets.ClassLabel, LABEL_NAMES
        )
        if not label and not optional:
            raise features.unclear("the class", "--label-column")
    if "image" in task:
        image = features.given(options.image_column, "--image-column") or features.only(datasets.Image, IMAGE_NAMES)
        if not image:
            raise features.unclear("the picture", "--image-column")
        return Columns(image=image, label=label)
    if options.text_column:
        names = [features.given(name.strip(), "--text-column") for name in options.text_column.split(",")]
        if len(names) > 2:
            raise DataError(f"--text-column takes one column, or two for pairs of sentences, not {len(names)}")
        return Columns(text=tuple(names), label=label)
    for pair in _PAIRS:
        if features.kinds.keys() >= set(pair):
            if task == "feature-extraction":
                return Columns(text=pair[:1], label=label)
            return Columns(text=pair, label=label)
    texts = _texts(features, "", label)
    if len(texts) != 1:
        raise features.unclear("the text", "--text-column")
    return Columns(text=texts, label=label)


def _texts(features: _Features, given: str, label: str) -> tuple[str, ...]:
    """The columns that may hold the text: the one that was given, else those with a usual name, else all texts."""
    if given:
        return (given,)
    texts = [name for name in features.texts if name != label]
    usual = [name for name in texts if name.lower() in _TEXTS]
    return tuple(usual or texts)


def _labels(parts: dict[str, Any], column: str, source: str) -> Labels:
    """The classes in `column`. A test split without labels (all -1) is taken out of `parts`."""
    feature = parts["train"].features[column]
    values = parts["train"].unique(column)
    if None in values:
        raise DataError(f"{source}: the label column {column!r} is empty in some rows; remove them")
    names: tuple[str, ...] = ()
    alphabetical = False
    if isinstance(feature, datasets_library().ClassLabel):
        names = tuple(feature.names)
        numbers: dict[Any, int] = dict(zip(range(len(names)), range(len(names)), strict=True))
        alphabetical = numbers_by_alphabet(source)
    elif set(map(type, values)) == {str}:
        names, alphabetical = tuple(sorted(values)), True
        numbers = dict(zip(names, range(len(names)), strict=True))
    elif all(map(_is_class, values)):
        numbers = dict(zip(values, map(int, values), strict=True))
    else:
        raise DataError(
            f"{source}: the label column {column!r} holds {listing(map(str, values[:4]))}; a class is a text or a "
            "number from 0, and scores (regression) are not a task here"
        )
    if alphabetical and all(map(str.isdecimal, names)):
        # numbers that are written as text, or as names of folders
        numbers = {value: int(names[number]) for value, number in numbers.items()}
        names, alphabetical = (), False
    for name in ("validation", "test"):
        if name not in parts or column not in parts[name].features:
            continue
        unknown = [value for value in parts[name].unique(column) if value not in numbers]
        if name == "test" and unknown in ([-1], [None]):
            del parts["test"]
        elif not names and all(map(_is_class, unknown)):
            numbers |= zip(unknown, map(int, unknown), strict=True)
        elif unknown:
            raise DataError(
                f"{source}: the label column {column!r} holds {unknown[0]!r} in the {name} split, "
                "which is no class of the training split"
            )
    count = len(numbers)
    if not names:
        count = max(numbers.values()) + 1
    if count > _MOST_CLASSES:
        raise DataError(
            f"{source}: the label column {column!r} holds {count - 1}; a number is the model's number of a class, from "
            "0: number the classes anew, or write their names"
        )
    return Labels(names, count, numbers, alphabetical)


def _is_class(value: Any) -> bool:
    """Whether a value may be the model's number of a class."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0


def _check_columns(part: Any, source: str, columns: Columns) -> None:
    for column in filter(None, (*columns.text, columns.label, columns.image, columns.tokens)):
        if column not in part.features:
            raise DataError(
                f"{source}: there is no column {column!r}; the columns are {_Features(part.features, source)}"
            )
        empty = part.data.column(column).null_count
        if empty:
            raise DataError(f"{source}: column {column!r} is empty in {empty} of {len(part)} rows; remove them")


def _sampled_rows(part: Any, limit: int, seed: int) -> Any:
    if len(part) <= limit:
        return part
    return part.select(np.sort(np.random.default_rng(seed).permutation(len(part))[:limit]), keep_in_memory=True)
