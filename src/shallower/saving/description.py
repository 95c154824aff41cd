"""What shallower.json may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from shallower.core.codec import Bounds, decode, encode
from shallower.errors import CheckpointError

FORMAT: Literal[4] = 4

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

# Edits have numbers that are no sizes: strides, paddings, ordinals of calls.
_SMALL = 1 << 16
# Each wraps what stands at its place; a second or third round on a result may add one more.
_WRAPS = ("slope", "partial")
_MOST_WRAPS = 8

Length = Annotated[int, Bounds(0, 1 << 48)]


@dataclass(frozen=True)
class Layout:
    """A tensor in a file.

        Layout.of(torch.zeros(8, 4))        # dtype "float32", shape (8, 4)

    Attributes:
        dtype: torch's name.
        shape: of it.
        strides: in memory, where they are not those of a contiguous tensor of this shape.
        order: what files of earlier versions have instead: dimensions from the slowest to the fastest.
    """

    dtype: str
    shape: tuple[Length, ...]
    strides: tuple[Length, ...] = ()
    order: tuple[Length, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError(f"the dtype {self.dtype!r:.40} is unknown")
        if self.order:
            if sorted(self.order) != list(range(len(self.shape))):
                raise CheckpointError(f"{self.order!r:.80} is not an order of its dimensions")
            object.__setattr__(self, "strides", _in_order(self.shape, self.order))
            object.__setattr__(self, "order", ())
        if self.strides and not _is_dense(self.shape, self.strides):
            raise CheckpointError(f"{self.strides!r:.80} are not strides of its shape")

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """What describes this tensor; one with gaps or overlaps in memory will be contiguous."""
        shape, strides = tuple(tensor.shape), tensor.stride()
        if strides == _contiguous(shape) or not _is_dense(shape, strides):
            strides = ()
        return cls(str(tensor.dtype).removeprefix("torch."), shape, strides)

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


@dataclass(frozen=True)
class Stock:
    """Whether the class of a library loads a model without this one.

        str(Stock("BertModel"))     # "the stock class loads this: BertModel.from_pretrained"

    Attributes:
        name: of the class, or the call of timm or torchvision that builds it; "" where there is nothing to say.
        why: the reason why it cannot, "" where it can.
    """

    name: Annotated[str, Bounds(0, 4000)] = ""
    why: Annotated[str, Bounds(0, 4000)] = ""

    def __str__(self) -> str:
        if not self.name:
            return ""
        if self.why:
            return f"the stock class cannot load this: {self.why}"
        if "(" in self.name:
            return f"the library builds this: {self.name}"
        return f"the stock class loads this: {self.name}.from_pretrained"


@dataclass(frozen=True)
class Description:
    """What shallower.json says; docs/format.md has the meaning of each key."""

    source: Annotated[str, Bounds(0, 4000)]
    edits: list[dict[str, Any]]
    tensors: dict[str, Layout]
    buffers: dict[str, Layout]
    tied: list[list[str]]
    frozen: list[str]
    training: dict[str, Any]
    files: list[str]
    stock: Stock = Stock()
    version: Literal[1, 2, 3, 4] = FORMAT
    schema: Literal["shallower"] = field(default="shallower", init=False)

    def __post_init__(self) -> None:
        _check_ties(self.tied, self.tensors, self.buffers)
        if not set(self.frozen) <= set(self.tensors):
            raise CheckpointError("frozen names a tensor that is not there")
        _check_edits(self.edits, self.largest)

    @property
    def names(self) -> dict[str, str]:
        """Every name that a parameter or persistent buffer of the model has -> the name it has in the files."""
        own = {name: name for name in self.tensors}
        return own | {alias: first for first, *aliases in self.tied for alias in aliases}

    @property
    def largest(self) -> int:
        """The largest dimension of a tensor."""
        entries = (*self.tensors.values(), *self.buffers.values())
        return max((size for entry in entries for size in entry.shape), default=0)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        data: dict[str, Any] = encode(self, special={Layout: _layout_data})
        return data

    @classmethod
    def from_json(cls, data: Any, at: str = DESCRIPTION) -> Description:
        """Read and check one.

        Raises:
            CheckpointError: it is of an unknown version or malformed.
        """
        if not isinstance(data, dict) or data.get("schema") != "shallower":
            raise CheckpointError(f"{at}: this is not the description of a saved model")
        version = data.get("version")
        if type(version) is not int or version not in (1, 2, 3, FORMAT):
            raise CheckpointError(
                f"{at}: the files have version {version!r:.40} of the format, and this Shallower reads version "
                f"{FORMAT}; install a newer one"
            )
        found: Description = decode(cls, data, at=at, error=CheckpointError)
        return found


def _layout_data(entry: Layout, _at: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"dtype": entry.dtype, "shape": list(entry.shape)}
    if entry.strides:
        plain["strides"] = list(entry.strides)
    return plain


def _check_ties(tied: list[list[str]], tensors: dict[str, Layout], buffers: dict[str, Layout]) -> None:
    taken = {*tensors, *buffers}
    for group in tied:
        if len(group) < 2 or group[0] not in tensors:
            raise CheckpointError(f"{group!r:.80} is not a group of tied names")
        for alias in group[1:]:
            if alias in taken:
                raise CheckpointError(f"tensor {alias:.80}: it is named twice")
            taken.add(alias)


def _check_edits(edits: list[dict[str, Any]], largest: int) -> None:
    """What performing the edits one by one cannot see: how much they make, and how deep they nest."""
    wraps: dict[str, int] = {}
    for i, edit in enumerate(edits):
        groups = edit.get("groups", 1)
        for key, value in edit.items():
            most = largest
            if isinstance(groups, int) and key in ("d_in", "d_out"):  # a grouped weight has only its group's columns
                most *= groups
            most = max(_SMALL, most)
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
