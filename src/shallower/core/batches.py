"""A set of batches that is read once, so that every pass sees the same data.

    calibration = Batches.read(loader)
    for batch in calibration:
        call(model, batch.on("cuda").inputs)
    calibration.digest                          # "9f86d0..."

Loaders shuffle, augment and are slow: what is read first is kept, in memory or, past a limit, in a temporary directory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallower.core.failures import failing
from shallower.core.files import read_tensors, temporary_folder, write_tensors
from shallower.core.inputs import Inputs, InputsOf, MaskOf, default_inputs_of, default_mask_of
from shallower.core.memory import free_bytes
from shallower.core.processes import gathered
from shallower.core.tensors import content
from shallower.core.trees import cloned, mapped, rows_of, tensors, to_device
from shallower.errors import DataError, SiteError

_LEAST_ROOM = 1 << 30


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and which positions of it count.

    Attributes:
        inputs: a tensor, positional arguments or keyword arguments.
        mask: positions that count; None for all.
        own_mask: whether the mask is of a user's own `mask_of`, which says what counts where it is calibrated.
    """

    inputs: Inputs
    mask: Tensor | None = None
    own_mask: bool = False

    @property
    def rows(self) -> int:
        """How many samples it holds."""
        common = rows_of(self.inputs)
        if common is not None:
            return common
        first = next(tensors(self.inputs))
        if first.dim() == 0:
            return 1
        return first.shape[0]

    def on(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        moved: Batch = to_device(self, device)
        return moved


class Batches:
    """Batches that were read once.

    Attributes:
        digest: SHA-256 of everything that was read.
        rows: samples in all batches.
        run: samples that networks have run on, each counted as often as it ran, by the part of the network that did.
    """

    def __init__(self, most: int | None = None) -> None:
        self.digest = ""
        self.rows = 0
        self.run = 0.0
        if most is None:
            most = max(_LEAST_ROOM, free_bytes() // 4)
        self._most = most
        self._kept: list[Batch | _Spilled] = []
        self._folder: Path | None = None

    @property
    def passes(self) -> float:
        """How often a network has run over all batches."""
        return self.run / max(1, self.rows)

    @classmethod
    def read(
        cls,
        batches: Iterable[Any] | Batches,
        inputs_of: InputsOf = default_inputs_of,
        mask_of: MaskOf | None = None,
        *,
        most: int | None = None,
        rows: int | None = None,
    ) -> Batches:
        """Read batches once; what was read by this function already, all or a few of it, stays as it is.

            calibration = Batches.read(DataLoader(dataset, batch_size=32, shuffle=True))

        Args:
            batches: a list, a DataLoader or a data set of batches.
            inputs_of: picks the model's inputs out of a batch.
            mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`.
            most: bytes that are kept in memory; by default a quarter of what is free, and at least 1 GiB.
            rows: batches are read until there are so many; by default all of them.

        Raises:
            SiteError: `batches` can be read only once or is a single batch, or a batch is not what a model is called
                with.
            DataError: a batch cannot be read.
        """
        if isinstance(batches, Batches):
            return batches
        found = cls(most)
        digest = hashlib.sha256()
        own = not isinstance(batches, (list, tuple))  # a loader may hand out the same memory again
        in_memory = 0
        for number, raw in enumerate(_each(batches), 1):
            if rows is not None and found.rows >= rows:
                break
            batch = raw
            if not isinstance(raw, Batch):
                batch = _picked(number, raw, inputs_of, mask_of or default_mask_of)
            _update(digest, (batch.inputs, batch.mask))
            in_memory += sum(map(_bytes, tensors((batch.inputs, batch.mask))))
            found.rows += batch.rows
            if in_memory > found._most:
                found._kept.append(found._spilled(number, batch))
            elif own:
                found._kept.append(cloned(batch))
            else:
                found._kept.append(batch)
        found.digest = digest.hexdigest()
        return found

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Batch:
        """A copy of a batch: what a model writes into its inputs stays out of the next pass."""
        batch = self._kept[index]
        if isinstance(batch, _Spilled):
            return batch.loaded()
        copied: Batch = cloned(batch)
        return copied

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self[index]

    def seen(self) -> tuple[str, ...]:
        """Digests of the rows of all processes, each once, in alphabetical order."""
        own: set[str] = set()
        for batch in self:
            own.update(row_digests(batch))
        return tuple(sorted(set().union(*gathered(own))))

    def _spilled(self, number: int, batch: Batch) -> _Spilled:
        if self._folder is None:
            self._folder = temporary_folder(self, error=DataError)
        path = self._folder / f"{number}.safetensors"
        written: dict[str, Tensor] = {}
        places: dict[int, tuple[str, torch.device]] = {}

        def stub(tensor: Tensor) -> Tensor:
            if not _bytes(tensor):
                return tensor.clone()
            name = str(len(written))
            written[name] = tensor
            empty = torch.empty_like(tensor, device="meta")
            places[id(empty)] = (name, tensor.device)
            return empty

        stubs = mapped(stub, batch)
        write_tensors(path, written, error=DataError)
        return _Spilled(path, stubs, places)


@dataclass(frozen=True)
class _Spilled:
    """A batch in a file.

    Attributes:
        path: of the file.
        stubs: the batch, with empty tensors in the place of those in the file.
        places: by the identity of a stub, its name in the file and its device.
    """

    path: Path
    stubs: Batch
    places: Mapping[int, tuple[str, torch.device]]

    def loaded(self) -> Batch:
        found = read_tensors(self.path, error=DataError)

        def filled(tensor: Tensor) -> Tensor:
            if id(tensor) not in self.places:
                return tensor.clone()
            name, device = self.places[id(tensor)]
            return found[name].to(device, copy=True)

        batch: Batch = mapped(filled, self.stubs)
        return batch


def row_digests(batch: Batch) -> list[str]:
    """Of each row a hash of what counts in it, the same whatever it is padded to and whatever stands beside it.

        row_digests(Batch({"input_ids": ids, "attention_mask": mask}, mask))

    64 bits: rows are told apart, and nobody is kept from making two that are equal.
    """
    rows, mask = batch.rows, batch.mask
    digests = [hashlib.blake2b(digest_size=8) for _ in range(rows)]
    for tensor in tensors(batch.inputs):
        if tensor.layout is not torch.strided or tensor.is_nested:
            tensor = tensor.to_dense()
        for index, digest in enumerate(digests):
            row = tensor
            if tensor.dim() and len(tensor) == rows:
                row = tensor[index]
                if mask is not None and mask.shape == tensor.shape[: mask.dim()]:
                    row = row[mask[index].bool()]
            digest.update(f"{tensor.dtype} {row.numel()}\n".encode())
            digest.update(content(row))
    return [digest.hexdigest() for digest in digests]


def _bytes(tensor: Tensor) -> int:
    """Bytes that could be in a file; sparse and nested tensors stay in memory."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return 0
    return tensor.nbytes


def _each(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches one by one; what cannot be read as batches is an error."""
    if isinstance(batches, Iterator):
        raise SiteError(
            "the batches are a one-shot iterator, and reading them would use them up: "
            "pass a list (list(batches)), a DataLoader or a data set"
        )
    if isinstance(batches, (Tensor, Mapping, str)):
        raise SiteError(f"`batches` is a single {type(batches).__name__}, not a list of batches: pass [batch]")
    with failing(SiteError, f"`batches` is a {type(batches).__name__}, which cannot be iterated over"):
        # a data set with neither `__iter__` nor an end is read by its length
        given: Any = batches
        if not hasattr(batches, "__iter__"):
            given = map(given.__getitem__, range(len(given)))
        iterator = iter(given)
    number = 0
    while True:
        number += 1
        with failing(DataError, f"batch {number} cannot be read"):
            batch = next(iterator, _END)
        if batch is _END:
            return
        yield batch


_END = object()


def _picked(number: int, raw: Any, inputs_of: InputsOf, mask_of: MaskOf) -> Batch:
    with failing(SiteError, f"`inputs_of` or `mask_of` fails on batch {number}"):
        inputs, mask = inputs_of(raw), mask_of(raw)
    if not isinstance(inputs, (Tensor, tuple, list, Mapping)) or next(tensors(inputs), None) is None:
        found = type(inputs).__name__
        if isinstance(inputs, (tuple, list, Mapping)):
            found += " without tensors"
        raise SiteError(
            f"batch {number}: a model is called with a tensor, a tuple or a dict of its arguments, not with a {found}; "
            "say with inputs_of= how to read your batches"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise SiteError(f"batch {number}: the mask is a {type(mask).__name__}, not a tensor; correct mask_of=")
    return Batch(inputs, mask, own_mask=mask is not None and mask_of is not default_mask_of)


def _update(digest: Any, tree: Any) -> None:
    """Add tensors, with what they are, and what else distinguishes one batch from another."""
    structure: list[str] = []

    def described(tensor: Tensor) -> Tensor:
        structure.append(f"{tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    mapped(described, tree)
    structure.append(_structure(tree))
    digest.update("\n".join(structure).encode())
    for tensor in tensors(tree):
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        parts = [tensor]
        if tensor.is_nested:
            parts = list(tensor.unbind())
        for part in parts:
            digest.update(content(part))


def _structure(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return "{" + ",".join(f"{key}:{_structure(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "[" + ",".join(map(_structure, tree)) + "]"
    if isinstance(tree, (bool, int, float, str, type(None))):
        return repr(tree)
    return type(tree).__name__
