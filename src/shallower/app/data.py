"""DATA on the command line: a hub name or local files, read with the `datasets` library.

    rows = read_rows("reviews.csv", "text-classification")
    rows.train, rows.validation, rows.columns.text, rows.labels.names

batching.py makes batches of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shallower.app.options import DataOptions, TaskName
from shallower.core.text import listing
from shallower.errors import DataError

_FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_READABLE = ", ".join([*_FORMATS, ".npz"])
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
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
_LABELS = ("label", "labels", "target", "class", "category", "fine_label", "y")
_MOST_CLASSES = 100_000
_MOST_DIMENSIONS = 5
_UNNAMED = re.compile(r"LABEL_\d+")
"""What Transformers calls a class that nobody named."""
_IMAGES = ("image", "images", "img", "pixel_values", "picture", "x")


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
    """

    names: tuple[str, ...]
    count: int
    numbers: Mapping[Any, int]

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
        if not self.names or not names:
            return self
        order = {name.casefold(): number for number, name in enumerate(names)}
        if set(order) == {name.casefold() for name in self.names}:
            model_number = [order[name.casefold()] for name in self.names]
            return replace(self, numbers={value: model_number[number] for value, number in self.numbers.items()})
        unnamed = all(map(_UNNAMED.fullmatch, names))
        if unnamed and not any(isinstance(value, str) for value in self.numbers):
            return self
        raise DataError(
            f"the classes of the data are {listing(self.names)}, the model's are {listing(names)}, and nothing says "
            "which is which: put the model's class numbers into the label column, or the names into the model's config "
            "(id2label)"
        )


@dataclass(frozen=True)
class Rows:
    """What the data holds, before anything is known of the model.

    Attributes:
        train: to train and calibrate on; a sequence of rows, each a mapping from column to value.
        validation: to choose on.
        test: to report on; None where the data has no labelled test part.
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
    parts = _parts(source)
    if options.eval_data:
        others = _parts(options.eval_data)
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
        parts["train"], parts["validation"] = _divided(parts["train"], source, options.held_out, seed)
    if options.limit is not None:
        parts = {name: _sample(part, options.limit, seed) for name, part in parts.items()}
    return Rows(parts["train"], parts["validation"], parts.get("test"), columns, labels, tuple(remarks))


def _divided(part: Any, source: str, held_out: float, seed: int) -> tuple[Any, Any]:
    """Rows to train on, and rows held out for validation, drawn at random."""
    if len(part) < 2:
        raise DataError(f"{source}: one row is too few to train on some and validate on others")
    order = np.random.default_rng(seed).permutation(len(part))
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    train, validation = np.sort(order[count:]), np.sort(order[:count])
    return part.select(train, keep_in_memory=True), part.select(validation, keep_in_memory=True)


def _parts(source: str) -> dict[str, Any]:
    """The train, validation and test parts of a source, whichever it has; a single part is the training one."""
    path = Path(source).expanduser()
    if path.is_dir():
        parts = _folder(path)
    elif path.is_file():
        parts = {"train": _file(path)} if path.suffix.lower() != ".npz" else _npz(path)
    elif path.suffix.lower() in (*_FORMATS, ".npz") or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: there is no such file or folder")
    else:
        parts = _hub(source)
    named = {_split_of(name) or name: part for name, part in reversed(parts.items())}
    if len(named) == 1 and "train" not in named:
        return {"train": next(iter(named.values()))}
    return {name: named[name] for name in _SPLITS if name in named} or named


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data is read with the datasets library: pip install shallower[data]") from error
    return datasets


def _load(source: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, whose many errors become one line about `source`."""
    datasets = _library()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or str(error).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"{source}: the data cannot be read: {reason}") from error


def _file(path: Path) -> Any:
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise DataError(f"{path}: a file of type {path.suffix or 'unknown'!r} is not read; these are: {_READABLE}")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    return _load(str(path), form[0], data_files=str(path), split="train", **form[1])


def _folder(path: Path) -> dict[str, Any]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        try:
            saved = _library().load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"{path}: this saved data set cannot be read: {str(error).splitlines()[0]}") from error
        return dict(saved) if isinstance(saved, Mapping) else {"train": saved}
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in (*_FORMATS, ".npz"))
    if files:
        parts: dict[str, Path] = {}
        for file in files:
            split = _split_of(file.stem) if len(files) > 1 else "train"
            if split in parts:
                raise DataError(f"{path}: both {parts[split].name} and {file.name} are its {split} part; name one file")
            if split:
                parts[split] = file
        if not parts:
            raise DataError(f"{path}: no file name says train, validation or test: {listing([f.name for f in files])}")
        if files[0].suffix.lower() == ".npz" and len(files) == 1:
            return _npz(files[0])
        return {
            split: _file(file) if file.suffix.lower() != ".npz" else next(iter(_npz(file).values()))
            for split, file in parts.items()
        }
    if any(p.suffix.lower() in _PICTURES for p in path.rglob("*")):
        return dict(_load(str(path), "imagefolder", data_dir=str(path), drop_labels=False))
    raise DataError(f"{path}: the folder holds no data: no {_READABLE} files and no pictures")


def _npz(path: Path) -> dict[str, Any]:
    """Arrays named image and label, or for each part x_train, y_train (or train_images, train_labels)..."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise DataError(f"{path}: the arrays cannot be read: {str(error).splitlines()[0]}") from error
    if not arrays:
        raise DataError(f"{path}: there is no array in it")
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        _check_array(path, name, array)
        split = _split_of(name) or "train"
        words = [w for w in re.split(r"[_\W]+", name.lower()) if not any(w in names for names in _SPLITS.values())]
        word = "_".join(words)
        column = "image" if word in _IMAGES else "label" if word in _LABELS else word or name
        parts.setdefault(split, {})[column] = array
    for split, columns in parts.items():
        if len({len(array) for array in columns.values() if array.ndim}) != 1:
            found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise DataError(f"{path}: the arrays of the {split} part must have the same number of rows: {found}")
    return {split: _arrays(columns) for split, columns in parts.items()}


def _check_array(path: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    """Raise DataError where an array cannot be a column of rows."""
    problem = ""
    if array.dtype.kind not in "biufUS":
        problem = "numbers or texts are read"
    elif array.ndim > _MOST_DIMENSIONS:
        problem = f"at most {_MOST_DIMENSIONS} dimensions are read"
    elif array.ndim and not len(array):
        problem = "it has no rows"
    if problem:
        raise DataError(f"{path}: the array {name!r} is {array.dtype} of shape {array.shape}, and {problem}")


def _arrays(columns: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """A data set of arrays, the pictures of which keep their number type."""
    datasets = _library()
    features, values = {}, {}
    for name, array in columns.items():
        kind = "string" if array.dtype.kind in "US" else str(array.dtype)
        shaped = {3: datasets.Array2D, 4: datasets.Array3D, 5: datasets.Array4D}.get(array.ndim)
        if name == "label" or array.ndim == 1:
            features[name], values[name] = datasets.Value(kind), array.reshape(len(array), -1)[:, 0].tolist()
        elif shaped is None:
            features[name], values[name] = datasets.List(datasets.Value(kind), length=array[0].size), list(array)
        else:
            features[name], values[name] = shaped(shape=array.shape[1:], dtype=kind), array
    arrays = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    if "image" in columns:
        arrays.set_format("numpy", columns=["image"], output_all_columns=True, dtype=columns["image"].dtype.type)
    return arrays


def _hub(source: str) -> dict[str, Any]:
    name, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{source}: there is no such file or folder, and it is no name on the hub")
    found = _load(source, name, configuration or None)
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def _split_of(name: str) -> str:
    """The part that a file's or an array's name speaks of: "train-00000", "x_train", "dev", "validation_matched"."""
    words = re.split(r"[_\W]+", name.lower())
    return next((split for split, names in _SPLITS.items() if any(word in names for word in words)), "")


def _columns(part: Any, source: str, task: TaskName, options: DataOptions, optional: bool) -> Columns:
    text, label, image = options.text_column, options.label_column, options.image_column
    datasets = _library()
    features: Mapping[str, Any] = part.features
    found = f"the columns are {_described(features)}"

    def given(name: str, option: str) -> str:
        if name and name not in features:
            raise DataError(f"{source}: there is no column {name!r} as {option} says; {found}")
        return name

    def first(names: Iterable[str]) -> str:
        return next((name for name in features if name.lower() in set(names)), "")

    strings = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    ]
    if task == "causal-lm":
        if not text and "input_ids" in features:
            return Columns(tokens="input_ids")
        texts = [given(text, "--text-column")] if text else [n for n in strings if n.lower() in _TEXTS] or strings
        if len(texts) != 1:
            raise DataError(f"{source}: which column holds the text, or input_ids? Say --text-column; {found}")
        return Columns(text=(texts[0],))

    if task in ("feature-extraction", "image-feature-extraction"):
        label = ""
    else:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        label = given(label, "--label-column") or (classes[0] if len(classes) == 1 else first(_LABELS))
        if not label and not optional:
            raise DataError(f"{source}: which column holds the class? Say --label-column; {found}")
    if task in ("image-classification", "image-feature-extraction"):
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        image = given(image, "--image-column") or (pictures[0] if len(pictures) == 1 else first(_IMAGES))
        if not image:
            raise DataError(f"{source}: which column holds the picture? Say --image-column; {found}")
        return Columns(image=image, label=label)

    if text:
        names = tuple(given(name.strip(), "--text-column") for name in text.split(","))
        if len(names) > 2:
            raise DataError(f"--text-column takes one column, or two for pairs of sentences, not {len(names)}")
        return Columns(text=names, label=label)
    pair: tuple[str, ...] | None = next((p for p in _PAIRS if all(name in features for name in p)), None)
    strings = [name for name in strings if name != label]
    texts = [name for name in strings if name.lower() in _TEXTS] or strings
    if pair is None and len(texts) != 1:
        raise DataError(f"{source}: which column holds the text? Say --text-column; {found}")
    if pair and task == "feature-extraction":
        pair = pair[:1]
    return Columns(text=pair or (texts[0],), label=label)


def _labels(parts: dict[str, Any], column: str, source: str) -> Labels:
    """The classes in `column`. A test part without labels (all -1) is taken out of `parts`."""
    datasets = _library()
    feature = parts["train"].features[column]
    values = parts["train"].unique(column)
    if None in values:
        raise DataError(f"{source}: the label column {column!r} is empty in some rows; remove them")
    if isinstance(feature, datasets.ClassLabel):
        names, numbers = tuple(feature.names), {number: number for number in range(len(feature.names))}
    elif all(isinstance(value, str) for value in values):
        names = tuple(sorted(values))
        numbers = {name: number for number, name in enumerate(names)}
    elif all(isinstance(value, (int, np.integer)) for value in values) and min(values) >= 0:
        names, numbers = (), {int(number): int(number) for number in values}
    else:
        shown = listing([str(value) for value in values[:4]])
        raise DataError(
            f"{source}: the label column {column!r} holds {shown}; a class is a text or a number from 0, "
            "and scores (regression) are not a task here"
        )
    for name in ("validation", "test"):
        if name not in parts or column not in parts[name].features:
            continue
        unknown = [value for value in parts[name].unique(column) if value not in numbers]
        if name == "test" and unknown in ([-1], [None]):
            del parts["test"]
        elif not names and all(isinstance(value, (int, np.integer)) and value >= 0 for value in unknown):
            numbers |= {int(number): int(number) for number in unknown}
        elif unknown:
            raise DataError(
                f"{source}: the label column {column!r} holds {unknown[0]!r} in the {name} part, "
                "which is no class of the training part"
            )
    count = len(numbers)
    if not names:
        count = max(numbers) + 1
    if count > _MOST_CLASSES:
        raise DataError(
            f"{source}: the label column {column!r} holds {count - 1}; a number is the model's number of a class, from "
            "0: number the classes anew, or write their names"
        )
    return Labels(names, count, numbers)


def _check_columns(part: Any, source: str, columns: Columns) -> None:
    for column in filter(None, (*columns.text, columns.label, columns.image, columns.tokens)):
        if column not in part.features:
            raise DataError(f"{source}: there is no column {column!r}; the columns are {_described(part.features)}")
        empty = part.data.column(column).null_count
        if empty:
            raise DataError(f"{source}: column {column!r} is empty in {empty} of {len(part)} rows; remove them")


def _sample(part: Any, limit: int, seed: int) -> Any:
    if len(part) <= limit:
        return part
    return part.select(np.sort(np.random.default_rng(seed).permutation(len(part))[:limit]), keep_in_memory=True)


def _described(features: Mapping[str, Any]) -> str:
    def kind(feature: Any) -> str:
        return str(getattr(feature, "dtype", None) or type(feature).__name__).replace("large_string", "string")

    return listing([f"{name} ({kind(feature)})" for name, feature in features.items()])
