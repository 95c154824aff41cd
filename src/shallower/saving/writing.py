"""The weights of a saved directory, and whether it may be written at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from shallower.core.failures import failing
from shallower.core.files import write_json, write_tensors
from shallower.core.tensors import content
from shallower.errors import CheckpointError
from shallower.saving.description import DESCRIPTION, INDEX
from shallower.saving.reading import read_description

_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(KB|MB|GB|TB)")


def write_weights(directory: Path, tensors: Mapping[str, Tensor], most: int) -> None:
    """Write tensors as model.safetensors, or as an index and several files of at most so many bytes."""
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=most
    )
    for name, keys in split.filename_to_tensors.items():
        part = {key: tensors[key] for key in keys}
        write_tensors(directory / name, part, error=CheckpointError, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX, index, error=CheckpointError)


def bytes_of(size: int | str) -> int:
    """A size in bytes, or as text.

        bytes_of("5GB")     # 5_000_000_000

    Raises:
        CheckpointError: it is no size, or not positive.
    """
    found = size
    if isinstance(size, str) and (text := _SIZE.fullmatch(size.strip().upper())):
        found = int(float(text[1]) * _BYTES[text[2]])
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{size!r:.40} is not the size of a file: give a positive number of bytes, or '5GB'")
    return found


def check_as_written(tensors: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Compare the tensors that were read back with the model's, byte by byte.

    Raises:
        CheckpointError: they differ.
    """
    for name, tensor in tensors.items():
        if content(tensor) != content(read[name]):
            raise CheckpointError(f"tensor {name}: the file does not hold what was written; is the disk sound?")


def check_replaceable(directory: Path) -> None:
    """Check that `save` may write to `directory`: it does not exist, is empty or an earlier result.

    Raises:
        CheckpointError: it may not.
    """
    advice = "give another directory, or remove it first"
    with failing(CheckpointError, f"{str(directory)!r:.200}: cannot be written to"):
        if not directory.exists():
            return
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: this is a file, and a directory is to be written")
        known = {DESCRIPTION}
        if (directory / DESCRIPTION).is_file():
            known |= set(read_description(directory).files)
        # The first foreign file decides: the directory may be anything, the whole disk for instance.
        for path in directory.rglob("*"):
            name = str(path.relative_to(directory))
            if path.is_dir() and not path.is_symlink():
                continue
            if len(known) == 1 and name != DESCRIPTION:
                raise CheckpointError(f"{directory}: not empty, and not the result of an earlier save; {advice}")
            if name not in known:
                raise CheckpointError(f"{directory}: holds {name}, which no save wrote; {advice}")
