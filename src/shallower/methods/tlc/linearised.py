"""An activation that can be put aside for a fixed line and taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linearised(nn.Module):
    """An activation f, or, once `set` has been called, a line in its place; which of the two is in its state.

        module = Linearised(nn.ReLU(), 64, gated=False, channels_first=True)
        module.set(slope, offset)           # slope * h + offset from now on

    Args:
        f: the activation.
        width: channels; None for one line for all.
        gated: f is a gate: what takes its place is the constant `slope`, not slope * h.
        channels_first: the channels are dimension 1, not the last.
    """

    slope: Tensor
    offset: Tensor
    linear: Tensor

    def __init__(self, f: nn.Module, width: int | None, gated: bool, channels_first: bool) -> None:
        super().__init__()
        self.f = f
        self.gated = gated
        self.channels_first = channels_first
        self.is_linear = False
        self.register_buffer("slope", torch.ones(width or 1))
        self.register_buffer("offset", torch.zeros(width or 1))
        self.register_buffer("linear", torch.zeros(1, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        """h of any shape that has its channels where `channels_first` says."""
        h = input
        if not self.is_linear:
            result: Tensor = self.f(h)
            return result
        slope, offset = self.aligned(self.slope, h), self.aligned(self.offset, h)
        if self.gated:
            return slope.expand_as(h)
        if self.slope.numel() == 1:
            return h
        return slope * h + offset

    def aligned(self, values: Tensor, like: Tensor) -> Tensor:
        """(n,) in the dtype of `like`, shaped to broadcast over it."""
        values = values.to(like.dtype)
        if self.channels_first and values.numel() > 1:
            values = values.view(-1, *[1] * (like.dim() - 2))
        return values

    def set(self, slope: Tensor, offset: Tensor) -> None:
        """Put the line slope * h + offset, (n,) each, in the place of f."""
        self.slope.copy_(slope)
        self.offset.copy_(offset)
        self.linear.fill_(True)
        self.is_linear = True

    def unset(self) -> None:
        """f again."""
        self.linear.fill_(False)
        self.is_linear = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_linear = bool(self.linear.item())

    def extra_repr(self) -> str:
        return f"linear={self.is_linear}"
