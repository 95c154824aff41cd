"""What shallower.json may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shallower.errors import CheckpointError

SCHEMA = "shallower"
VERSION = 3
_EARLIER = (1, 2)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = "buffers.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
DESCRIPTION = "shallower.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}

_MOST = 1 << 48
# Edits have numbers that are no sizes: strides, paddings, ordinals of calls.
_SMALL = 1 << 16
# Each wraps what stands at its place; a second or third round on a result may add one more.
_WRAPS = ("slope", "partial")
_MOST_WRAPS = 8


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

        Entry.of(torch.zeros(8, 4))        # dtype "float32", shape (8, 4)

    Attributes:
        dtype: torch's name.
        shape: of it.
        strides: in memory, where they are not those of a contiguous tensor of this shape.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """What describes this tensor; one with gaps or overlaps in memory will be contiguous."""
        shape, strides = tuple(tensor.shape), tensor.stride()
        plain = strides == _contiguous(shape) or not _is_dense(shape, strides)
        return cls(str(tensor.dtype).removeprefix("torch."), shape, () if plain else strides)

    @classmethod
    def from_json(cls, name: str, data: Any) -> Entry:
        """Read and check one; earlier versions have an `order` of dimensions instead of strides."""
        if not isinstance(data, dict) or not {"dtype", "shape"} <= set(data) <= {"dtype", "shape", "strides", "order"}:
            raise CheckpointError(f"tensor {name:.200}: it must be described by dtype, shape and perhaps strides")
        dtype, shape = data["dtype"], data["shape"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"tensor {name:.200}: the dtype {dtype!r:.40} is unknown")
        if not _are_counts(shape):
            raise CheckpointError(f"tensor {name:.200}: {shape!r:.80} is not a shape")
        strides, order = data.get("strides", []), data.get("order", [])
        if not _are_counts(order) or (order and sorted(order) != list(range(len(shape)))):
            raise CheckpointError(f"tensor {name:.200}: {order!r:.80} is not an order of its dimensions")
        if order:
            strides = _in_order(shape, order)
        if not _are_counts(strides) or (strides and not _is_dense(shape, strides)):
            raise CheckpointError(f"tensor {name:.200}: {strides!r:.80} are not strides of its shape")
        return cls(dtype, tuple(shape), tuple(strides))

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        plain: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return {**plain, "strides": list(self.strides)} if self.strides else plain

    def arranged(self, tensor: Tensor) -> Tensor:
        """A copy of the `tensor` of a file, in the memory layout that it had.

        Copied also where the layout is the same: in a mapped file a tensor starts at any multiple of 8 bytes, and on
        that depends which kernel computes with it, hence the last bit of the result.
        """
        strides = self.strides or _contiguous(self.shape)
        return torch.empty_strided(self.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return _in_order(shape, range(len(shape)))


def _in_order(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that lies in memory by these dimensions, from the slowest to the fastest."""
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether every element has a place of its own and there are no gaps; strides of dimensions of size 1 are free."""
    if len(shape) != len(strides) or 0 in shape:
        return False
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return all(stride <= step for stride in strides)


@dataclass
class Description:
    """What shallower.json says; docs/format.md has the meaning of each key."""

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

    @property
    def largest(self) -> int:
        """The largest dimension of a tensor."""
        return max(
            (size for entry in (*self.tensors.values(), *self.buffers.values()) for size in entry.shape), default=0
        )

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
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
        """Read and check one.

        Raises:
            CheckpointError: it is of an unknown version or malformed.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError("this is not the description of a saved model")
        version = data.get("version")
        if type(version) is not int or version not in (*_EARLIER, VERSION):
            raise CheckpointError(
                f"the files have version {version!r:.40} of the format, and this Shallower reads version {VERSION}; "
                "install a newer one"
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
                raise CheckpointError(f"{key} must be a {kind.__name__}, not a {type(data[key]).__name__}")
        tensors = {name: Entry.from_json(name, entry) for name, entry in data["tensors"].items()}
        buffers = {name: Entry.from_json(name, entry) for name, entry in data["buffers"].items()}
        _check_ties(data["tied"], tensors, buffers)
        if not _are_names(data["frozen"]) or not set(data["frozen"]) <= set(tensors):
            raise CheckpointError("frozen names a tensor that is not there")
        if not _are_names(data["files"]):
            raise CheckpointError("files must be a list of names")
        found = cls(**{**{key: data[key] for key in kinds}, "tensors": tensors, "buffers": buffers})
        _check_edits(found.edits, found.largest)
        return found


def _check_ties(tied: list[Any], tensors: dict[str, Entry], buffers: dict[str, Entry]) -> None:
    taken = {*tensors, *buffers}
    for group in tied:
        if not _are_names(group) or len(group) < 2 or group[0] not in tensors:
            raise CheckpointError(f"{group!r:.80} is not a group of tied names")
        for alias in group[1:]:
            if alias in taken:
                raise CheckpointError(f"tensor {alias:.80}: it is named twice")
            taken.add(alias)


def _check_edits(edits: list[Any], largest: int) -> None:
    """What performing the edits one by one cannot see: how much they make, and how deep they nest."""
    wraps: dict[str, int] = {}
    for i, edit in enumerate(edits):
        if not isinstance(edit, dict):
            raise CheckpointError(f"edit {i} of the saved model is not an object")
        groups = edit.get("groups", 1)
        for key, value in edit.items():
            most = max(_SMALL, largest * groups if isinstance(groups, int) and key in ("d_in", "d_out") else largest)
            if isinstance(value, int) and value > most:
                raise CheckpointError(f"edit {i}: {key} = {value!r:.40} is larger than any tensor in the files")
        if edit.get("edit") in _WRAPS:
            # The wrapped activation is called f, so that a wrap of a wrap has the same place.
            place = re.sub(r"(\.f)+$", "", str(edit.get("name")))
            wraps[place] = wraps.get(place, 0) + 1
            if wraps[place] > _MOST_WRAPS:
                raise CheckpointError(
                    f"edit {i}: the activation at {place!r:.200} is wrapped more than {_MOST_WRAPS} times"
                )


def _are_counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int and 0 <= item < _MOST for item in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
