"""What a linear map reads at each of its output positions, as rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.sites import LinearMap

_PER_COLUMN = 256
"""Positions of a convolution that are used, for each column of its patches: neighbours are correlated."""

_PATCH_VALUES = 1 << 22
"""Values of patches that are made at a time."""


def patches(z: Tensor, m: LinearMap, step: int = 1) -> Tensor:
    """What each output position of a map reads: (positions, d_in * taps), the taps of a channel beside one another.

    Args:
        z: in the map's own layout.
        m: the map.
        step: take every `step`-th position.
    """
    if m.kind != "conv2d":
        return flat(z, False)[::step]
    if m.taps == 1 and m.padding == (0, 0):
        return flat(z[:, :, :: m.stride[0], :: m.stride[1]], True)[::step]
    found, seen = [], 0
    for images in torch.split(z, max(1, _PATCH_VALUES // max(1, z[0].numel() * m.taps))):
        columns = F.unfold(images, m.kernel, dilation=m.dilation, padding=m.padding, stride=m.stride)
        each = columns.shape[2]
        taken = torch.arange(-seen % step, len(images) * each, step, device=z.device)
        found.append(columns.transpose(1, 2)[taken // each, taken % each])
        seen += len(images) * each
    return torch.cat(found)


def unusual_padding(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a convolution pads its input where a `LinearMap` does not say it: not with zeros, or not evenly."""
    if not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and module.padding != "same"):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return lambda x: F.pad(x, module._reversed_padding_repeated_twice, mode)


def thinned(positions: int, channels: int, taps: int) -> int:
    """Stride between sampled positions: 1 for tokens; larger for convolutions, whose neighbours are correlated."""
    return max(1, positions // (_PER_COLUMN * channels * taps)) if taps > 1 else 1


def flat(t: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels)."""
    if channels_first:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])
