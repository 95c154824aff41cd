"""The files of a saved directory, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from shallower.core.failures import failing
from shallower.errors import CheckpointError
from shallower.saving.description import BUFFERS, CONFIG, DESCRIPTION, GENERATION, INDEX, WEIGHTS, Description, Entry
from shallower.saving.sources import source_of

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MOST_JSON = 64 << 20


# ------------------------------------------------------------------------------------------------------- reading


def _read_json(directory: Path, name: str) -> Any:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key is given twice")
        return result

    path = _inside(directory, name)
    with failing(CheckpointError, f"{path}: not readable as JSON"):
        if path.stat().st_size > _MOST_JSON:
            raise CheckpointError(f"{path}: larger than {_MOST_JSON >> 20} MiB, too large to be a description")
        return json.loads(path.read_text("utf-8"), object_pairs_hook=unique)


def _inside(directory: Path, name: str) -> Path:
    """The file of that name, which must lie in the directory itself."""
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path}: leads out of the directory; copy the file itself into it")
    return path


def read_description(directory: Path) -> Description:
    if not directory.is_dir():
        kept = sorted(directory.parent.glob(f".{directory.name}.previous-*")) if directory.name else []
        hint = f"; an interrupted save left the earlier one at {kept[-1]}, rename it" if kept else ""
        raise CheckpointError(f"{directory}: there is no such directory{hint}")
    try:
        return Description.from_json(_read_json(directory, DESCRIPTION))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}" if str(directory) not in str(error) else str(error)) from error


def read_config(directory: Path, source: str) -> dict[str, Any] | None:
    if not source.startswith("transformers:"):
        return None
    config = _read_json(directory, CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG}: not the config of a model")
    return config


def read_tensors(directory: Path, description: Description) -> dict[str, Tensor]:
    if not (directory / INDEX).exists():
        return _read_safetensors(directory, WEIGHTS, description.tensors)
    index = _read_json(directory, INDEX)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{directory / INDEX}: not the index of a model in several files")
    shards: dict[str, dict[str, Entry]] = {}
    for name, shard in shard_of.items():
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(f"{directory / INDEX}: {shard!r:.200} is not the name of a file beside it")
        if name not in description.tensors:
            raise CheckpointError(f"tensor {name:.200}: it is in the index and not in {DESCRIPTION}")
        shards.setdefault(shard, {})[name] = description.tensors[name]
    absent = next((name for name in description.tensors if name not in shard_of), None)
    if absent is not None:
        raise CheckpointError(f"tensor {absent}: it is not in the index")
    tensors: dict[str, Tensor] = {}
    for shard, entries in shards.items():
        tensors |= _read_safetensors(directory, shard, entries)
    return tensors


def read_buffers(directory: Path, description: Description) -> dict[str, Tensor]:
    return _read_safetensors(directory, BUFFERS, description.buffers) if description.buffers else {}


def _read_safetensors(directory: Path, name: str, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    path = _inside(directory, name)
    with failing(CheckpointError, f"{path}: damaged or not a safetensors file"):
        tensors: dict[str, Tensor] = load_file(path)
    for key in (*entries, *tensors):
        if key not in tensors:
            raise CheckpointError(f"tensor {key}: it is not in {path}")
        if key not in entries:
            raise CheckpointError(f"tensor {key:.200}: it is in {path} and not in {DESCRIPTION}")
        found = Entry.of(tensors[key])
        if (found.dtype, found.shape) != (entries[key].dtype, entries[key].shape):
            raise CheckpointError(
                f"tensor {key}: {path} has it as {found.dtype} {list(found.shape)}, and {DESCRIPTION} as "
                f"{entries[key].dtype} {list(entries[key].shape)}"
            )
    return tensors


def read_generation_config(model: nn.Module, directory: Path) -> None:
    if not source_of(model) or not (directory / GENERATION).exists():
        return
    settings = _read_json(directory, GENERATION)
    with failing(CheckpointError, f"{directory / GENERATION}: not a generation config"):
        cast("Any", model).generation_config = type(cast("Any", model).generation_config).from_dict(settings)
