"""What shallower.json may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shallower.errors import CheckpointError

SCHEMA = "shallower"
VERSION = 2
_EARLIER = 1

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = "buffers.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}


# -------------------------------------------------------------------------------------------------- description


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `order` lists its dimensions from the slowest to the fastest where that is not their own."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
        plain = tensor.is_contiguous() or not tensor.permute(order).is_contiguous()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), () if plain else order)

    @classmethod
    def from_json(cls, name: str, data: Any) -> Entry:
        if not isinstance(data, dict) or not {"dtype", "shape"} <= set(data) <= {"dtype", "shape", "order"}:
            raise CheckpointError(f"tensor {name}: it is described by a dtype, a shape and perhaps an order")
        dtype, shape, order = data["dtype"], data["shape"], data.get("order", [])
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"tensor {name}: the dtype {dtype!r:.40} is unknown")
        if not _are_counts(shape):
            raise CheckpointError(f"tensor {name}: {shape!r:.80} is not a shape")
        if not _are_counts(order) or (order and sorted(order) != list(range(len(shape)))):
            raise CheckpointError(f"tensor {name}: {order!r:.80} is not an order of its dimensions")
        return cls(dtype, tuple(shape), tuple(order))

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return {**plain, "order": list(self.order)} if self.order else plain

    def arranged(self, tensor: Tensor) -> Tensor:
        """A copy of the `tensor` of a file, in the memory layout that it had.

        Copied also where the layout is the same: in a mapped file a tensor starts at any multiple of 8 bytes, and on
        that depends which kernel computes with it, hence the last bit of the result.
        """
        if not self.order:
            return tensor.clone()
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return tensor.permute(self.order).contiguous().permute(inverse)


@dataclass
class Description:
    """What shallower.json says."""

    source: str
    edits: list[dict[str, Any]]
    tensors: dict[str, Entry]
    buffers: dict[str, Entry]
    tied: list[list[str]]
    frozen: list[str]
    training: dict[str, Any]
    files: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[str, str]:
        """Every name that a parameter or persistent buffer of the model has -> the name it has in the files."""
        own = {name: name for name in self.tensors}
        return own | {alias: first for first, *aliases in self.tied for alias in aliases}

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "source": self.source,
            "edits": self.edits,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "buffers": {name: entry.to_json() for name, entry in self.buffers.items()},
            "tied": self.tied,
            "frozen": self.frozen,
            "training": self.training,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, data: Any) -> Description:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError("this is not the description of a saved model")
        if type(data.get("version")) is not int or data["version"] not in (_EARLIER, VERSION):
            raise CheckpointError(
                f"the files have version {data.get('version')!r:.40} of the format, and this Shallower reads version "
                f"{VERSION}; install a newer one"
            )
        kinds: dict[str, type] = {
            **{"source": str, "edits": list, "tensors": dict, "buffers": dict, "tied": list, "frozen": list},
            **{"training": dict, "files": list},
        }
        odd = set(data) ^ {"schema", "version", *kinds}
        if odd:
            raise CheckpointError(f"missing or unknown keys: {', '.join(sorted(odd))[:200]}")
        for key, kind in kinds.items():
            if not isinstance(data[key], kind):
                raise CheckpointError(f"{key} is a {kind.__name__}, not a {type(data[key]).__name__}")
        tensors = {name: Entry.from_json(name, entry) for name, entry in data["tensors"].items()}
        buffers = {name: Entry.from_json(name, entry) for name, entry in data["buffers"].items()}
        taken = {*tensors, *buffers}
        for group in data["tied"]:
            if not _are_names(group) or len(group) < 2 or group[0] not in tensors:
                raise CheckpointError(f"{group!r:.80} is not a group of tied names")
            for alias in group[1:]:
                if alias in taken:
                    raise CheckpointError(f"tensor {alias:.80}: it is named twice")
                taken.add(alias)
        if not _are_names(data["frozen"]) or not set(data["frozen"]) <= set(tensors):
            raise CheckpointError("frozen names a tensor that is not there")
        if not _are_names(data["files"]):
            raise CheckpointError("files is a list of names")
        return cls(**{**{key: data[key] for key in kinds}, "tensors": tensors, "buffers": buffers})


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


DESCRIPTION = "shallower.json"
