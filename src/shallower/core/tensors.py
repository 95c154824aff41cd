"""What a tensor holds, as bytes, and whether it holds anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether this is a meta or fake tensor."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def are_finite(given: Iterable[Tensor]) -> bool:
    """Whether every number in these tensors is finite."""
    return all(bool(t.isfinite().all()) for t in given)


def nbytes_of(given: Iterable[Tensor]) -> int:
    """Bytes that the numbers of these tensors take, all together."""
    return sum(t.numel() * t.element_size() for t in given)


def content(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as bytes in logical order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    # as bytes, since NumPy does not know every dtype (bfloat16)
    return flat.view(torch.uint8).numpy().data


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names and types.

    hash_of_weights(model)              # "9f86d0..."
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content(tensor))
    return digest.hexdigest()
