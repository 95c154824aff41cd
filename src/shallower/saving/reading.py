"""The files of a saved directory, read and checked."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from shallower.core import files
from shallower.core.failures import failing
from shallower.errors import CheckpointError
from shallower.saving.description import BUFFERS, CONFIG, DESCRIPTION, GENERATION, INDEX, WEIGHTS, Description, Layout
from shallower.saving.sources import source_of

# Lists with an item for each of a million layers keep the validation of a config busy for minutes.
_MOST_CONFIG = 8 << 20
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read_description(directory: Path) -> Description:
    """What shallower.json says.

    Raises:
        CheckpointError: the directory or the file is missing, or damaged.
    """
    with failing(CheckpointError, f"{str(directory)!r:.200}: cannot be read"):
        if not directory.is_dir():
            kept: list[Path] = []
            hint = ""
            if directory.name:
                kept = sorted(directory.parent.glob(f".{glob.escape(directory.name)}.previous-*"))
            if kept:
                hint = f"; an interrupted save left the earlier one at {kept[-1]}, rename it"
            raise CheckpointError(f"{directory}: there is no such directory{hint}")
    path = directory / DESCRIPTION
    return Description.from_json(files.read_json(path, error=CheckpointError), str(path))


def read_config(directory: Path, source: str) -> dict[str, Any] | None:
    """config.json of a Transformers model, None of any other.

    Raises:
        CheckpointError: it is missing, or damaged.
    """
    if not source.startswith("transformers:"):
        return None
    config = files.read_json(directory / CONFIG, error=CheckpointError, most=_MOST_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG}: not the config of a model")
    return config


def read_weights(directory: Path, description: Description) -> dict[str, Tensor]:
    """The parameters and persistent buffers, from one file or several.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold exactly what is described.
    """
    if not (directory / INDEX).exists():
        return _read_described(directory / WEIGHTS, description.tensors)
    index = files.read_json(directory / INDEX, error=CheckpointError)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{directory / INDEX}: not the index of a model in several files")
    shards: dict[str, dict[str, Layout]] = {}
    for name, shard in shard_of.items():
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(f"{directory / INDEX}: {shard!r:.200} is not the name of a file beside it")
        if name not in description.tensors:
            raise CheckpointError(f"tensor {name:.200}: it is in the index and not in {DESCRIPTION}")
        shards.setdefault(shard, {})[name] = description.tensors[name]
    absent = next((name for name in description.tensors if name not in shard_of), None)
    if absent is not None:
        raise CheckpointError(f"tensor {absent:.200}: it is not in the index")
    tensors: dict[str, Tensor] = {}
    for shard, entries in shards.items():
        tensors |= _read_described(directory / shard, entries)
    return tensors


def read_buffers(directory: Path, description: Description) -> dict[str, Tensor]:
    """The buffers that no state dict holds.

    Raises:
        CheckpointError: the file is missing or damaged, or does not hold exactly what is described.
    """
    if not description.buffers:
        return {}
    return _read_described(directory / BUFFERS, description.buffers)


def _read_described(path: Path, entries: Mapping[str, Layout]) -> dict[str, Tensor]:
    tensors = files.read_tensors(path, error=CheckpointError)
    for key in (*entries, *tensors):
        if key not in tensors:
            raise CheckpointError(f"tensor {key:.200}: it is not in {path}")
        if key not in entries:
            raise CheckpointError(f"tensor {key:.200}: it is in {path} and not in {DESCRIPTION}")
        found = Layout.of(tensors[key])
        if (found.dtype, found.shape) != (entries[key].dtype, entries[key].shape):
            raise CheckpointError(
                f"tensor {key}: {path} has it as {found.dtype} {list(found.shape)}, and {DESCRIPTION} as "
                f"{entries[key].dtype} {list(entries[key].shape)}"
            )
    return tensors


def read_generation_config(model: nn.Module, directory: Path) -> None:
    """Give a Transformers model the settings for generating text that lie beside it, if there are any.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / GENERATION
    if not source_of(model) or not path.exists():
        return
    settings = files.read_json(path, error=CheckpointError)
    with failing(CheckpointError, f"{path}: not a generation config"):
        cast("Any", model).generation_config = type(cast("Any", model).generation_config).from_dict(settings)
