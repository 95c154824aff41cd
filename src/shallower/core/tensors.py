"""What a tensor holds, as bytes, and whether it holds anything."""

from __future__ import annotations

import torch
from torch import Tensor


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether this is a meta or fake tensor."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def content(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as bytes in logical order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
