"""Files, folders and names on the hub, opened with the `datasets` library.

    parts_of("reviews/")        # {"train": ..., "validation": ...}

data.py finds in them what a task needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shallower.core.failures import failing
from shallower.core.text import listing
from shallower.errors import DataError
from shallower.saving.hub import as_reachable, is_reachable

Array = np.ndarray[Any, Any]

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
IMAGE_NAMES = ("image", "images", "img", "pixel_values", "picture", "x")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "fine_label", "y")
_MOST_DIMENSIONS = 5


def parts_of(source: str) -> dict[str, Any]:
    """The train, validation and test parts of a source, whichever it has; a single part is the training one."""
    path = Path(source).expanduser()
    if path.is_dir():
        parts = _folder(path)
    elif path.is_file():
        parts = _file(path)
    elif path.suffix.lower() in (*_FORMATS, ".npz") or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: there is no such file or folder")
    else:
        parts = _hub(source)
    named: dict[str, Any] = {}
    for name, part in parts.items():
        named.setdefault(_split_of(name) or name, part)
    if len(named) == 1:
        return {"train": part}
    known = {name: named[name] for name in _SPLITS if name in named}
    return known or named


def datasets_library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data is read with the datasets library: pip install shallower[data]") from error
    return datasets


def _load(place: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, whose many errors become one line that begins with `place`."""
    datasets = datasets_library()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        with failing(DataError, place):
            raise cause from None


def _file(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path)
    if suffix not in _FORMATS:
        raise DataError(f"{path}: a file of type {path.suffix or 'unknown'!r} is not read; these are: {_READABLE}")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    form, options = _FORMATS[suffix]
    return {"train": _load(f"{path}: the data cannot be read", form, data_files=str(path), split="train", **options)}


def _folder(path: Path) -> dict[str, Any]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        with failing(DataError, f"{path}: this saved data set cannot be read"):
            return _split_up(datasets_library().load_from_disk(str(path)))
    files = _tables_in(path)
    if len(files) == 1:
        return _file(files[0])
    if files:
        return dict(_files_by_split(path, files))
    if any(p.suffix.lower() in _PICTURES for p in path.rglob("*")):
        return dict(_load(f"{path}: the data cannot be read", "imagefolder", data_dir=str(path), drop_labels=False))
    raise DataError(f"{path}: the folder holds no data: no {_READABLE} files and no pictures")


def numbers_by_alphabet(source: str) -> bool:
    """Whether the classes of a source are the names of folders, whose numbers nobody chose."""
    path = Path(source).expanduser()
    saved = (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
    return path.is_dir() and not saved and not _tables_in(path)


def _tables_in(folder: Path) -> list[Path]:
    readable = (*_FORMATS, ".npz")
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in readable)


def _files_by_split(folder: Path, files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Each file whose name says which split it is, opened."""
    chosen: dict[str, Path] = {}
    for file in files:
        split = _split_of(file.stem)
        if split in chosen:
            raise DataError(f"{folder}: both {chosen[split].name} and {file.name} are its {split} part; name one file")
        if split:
            chosen[split] = file
    if not chosen:
        raise DataError(f"{folder}: no file name says train, validation or test: {listing(f.name for f in files)}")
    for split, file in chosen.items():
        yield split, next(iter(_file(file).values()))


def _split_up(found: Any) -> dict[str, Any]:
    """What the library opened, by split."""
    if isinstance(found, Mapping):
        return dict(found)
    return {"train": found}


def _npz(path: Path) -> dict[str, Any]:
    """Arrays named image and label, or for each part x_train, y_train (or train_images, train_labels)..."""
    with failing(DataError, f"{path}: the arrays cannot be read"), np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    if not arrays:
        raise DataError(f"{path}: there is no array in it")
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        _check_array(path, name, array)
        parts.setdefault(_split_of(name) or "train", {})[_column_of(name)] = array
    for split, columns in parts.items():
        lengths = set(map(len, filter(np.ndim, columns.values())))
        if len(lengths) != 1:
            found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise DataError(f"{path}: the arrays of the {split} part must have the same number of rows: {found}")
        parts[split] = _arrays(columns)
    return parts


def _column_of(name: str) -> str:
    """The column that an array's name speaks of: "image" for x_train, "label" for test_labels."""
    splits = set().union(*_SPLITS.values())
    word = "_".join(word for word in re.split(r"[_\W]+", name.lower()) if word not in splits)
    if word in IMAGE_NAMES:
        return "image"
    if word in LABEL_NAMES:
        return "label"
    return word or name


def _check_array(path: Path, name: str, array: Array) -> None:
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


def _arrays(columns: Mapping[str, Array]) -> Any:
    """A data set of arrays, the pictures of which keep their number type."""
    datasets = datasets_library()
    features, values = {}, {}
    for name, array in columns.items():
        kind = str(array.dtype)
        if array.dtype.kind in "US":
            kind = "string"
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
    place = f"{source}: there is no such file or folder, and the hub gives no such data"
    if not is_reachable():
        place = f"{source}: there is no such file or folder, and the hub cannot be reached"
    with as_reachable():
        return _split_up(_load(place, name, configuration or None))


def _split_of(name: str) -> str:
    """The part that a file's or an array's name speaks of: "train-00000", "x_train", "dev", "validation_matched"."""
    words = set(re.split(r"[_\W]+", name.lower()))
    for split, names in _SPLITS.items():
        if words & set(names):
            return split
    return ""
