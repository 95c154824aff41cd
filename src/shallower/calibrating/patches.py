"""What a linear map reads at each of its output positions, as rows."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.batches import Batch
from shallower.errors import FitError
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
    # every step-th position of all images, as if they stood one behind the other
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
    mode: str = module.padding_mode
    if mode == "zeros":
        mode = "constant"
    return lambda x: F.pad(x, module._reversed_padding_repeated_twice, mode)


def thinned(positions: int, channels: int, taps: int) -> int:
    """Stride between sampled positions: 1 for tokens; larger for convolutions, whose neighbours are correlated."""
    if taps == 1:
        return 1
    return max(1, positions // (_PER_COLUMN * channels * taps))


def flat(t: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels)."""
    if channels_first:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])


def flat_mask(mask: Tensor | None) -> Tensor | None:
    """(positions,) which of them count; None for all."""
    if mask is None:
        return None
    return mask.bool().flatten()


def check_mask(batch: Batch, rows: Collection[int]) -> None:
    """Refuse a mask of the user's own that is of other positions than every layer has.

    An `attention_mask` that came with the batch may be of positions that none of these layers has.

    Args:
        batch: that ran.
        rows: how many positions each of some layers had.

    Raises:
        FitError: it fits none of them.
    """
    if batch.mask is None or not batch.own_mask or not rows or batch.mask.numel() in rows:
        return
    shape, found = tuple(batch.mask.shape), " or ".join(map(str, sorted(set(rows))))
    raise FitError(
        f"the mask that `mask_of` returns has shape {shape}, {batch.mask.numel()} positions, and the layers of the "
        f"sites have {found} on this batch: return a number for each of these (rows times tokens), or None if all count"
    )


def unmasked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (positions, channels) that count; all, where the mask is not of these positions."""
    if mask is not None and len(mask) == len(rows):
        return rows[mask]
    return rows
