"""A directory written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shallower.errors import CheckpointError
from shallower.saving.description import DESCRIPTION, INDEX
from shallower.saving.reading import read_description

# ------------------------------------------------------------------------------------------------------- writing


def write_tensors(directory: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, directory / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError unless `save` may write to `directory`: it is not there, is empty or an earlier result."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: this is a file, and a directory is to be written")
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    if not there:
        return
    advice = "give another directory, or remove it first"
    if DESCRIPTION not in there:
        raise CheckpointError(f"{directory}: not empty, and not the result of an earlier save; {advice}")
    foreign = sorted(there - {DESCRIPTION, *read_description(directory).files})
    if foreign:
        raise CheckpointError(f"{directory}: holds {foreign[0]}, which no save wrote; {advice}")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` at the end, or leaves no trace."""
    token = secrets.token_hex(4)
    partial = directory.with_name(f".{directory.name}.partial-{token}")
    previous = directory.with_name(f".{directory.name}.previous-{token}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        if directory.exists():
            directory.rename(previous)
        try:
            partial.rename(directory)
        except BaseException:
            if previous.exists():
                previous.rename(directory)
            raise
        _to_disk(directory.parent)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
