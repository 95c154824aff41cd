"""Nested Python data and tensors in one safetensors file, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shallower.errors import TrainingError


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tuples, numbers, texts and tensors as one safetensors file, atomically.

    The tensors are the file's tensors; the rest is JSON in its header.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            if plain.untyped_storage().data_ptr() in storages:
                plain = plain.clone()
            storages.add(plain.untyped_storage().data_ptr())
            name = str(len(tensors))
            tensors[name] = plain
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [encode(item) for item in value]}
        if isinstance(value, list):
            return [encode(item) for item in value]
        return value

    text = json.dumps(encode(state))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"state": text})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_state(path: Path) -> Any:
    """What `write_state` wrote.

    Raises:
        TrainingError: the file is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:

            def decode(value: Any) -> Any:
                if isinstance(value, list):
                    return [decode(item) for item in value]
                if not isinstance(value, dict):
                    return value
                ((kind, content),) = value.items()
                if kind == "tensor":
                    return file.get_tensor(content)
                if kind == "tuple":
                    return tuple(decode(item) for item in content)
                return {decode(key): decode(item) for key, item in content}

            return decode(json.loads((file.metadata() or {})["state"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint ({error}); delete it to start again") from error
