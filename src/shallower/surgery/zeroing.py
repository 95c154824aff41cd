"""A followed site simulated: its dropped channels are zero in every tensor in which they stand."""

from __future__ import annotations

import torch
from torch import nn

from shallower.planning.entries import Entry


@torch.no_grad()
def zero(model: nn.Module, entry: Entry) -> None:
    """Set a site's dropped channels to zero in every tensor, in place: what cutting them must equal.

    Channels that nothing writes and nothing reads change nothing else. Where they stand is asked of each position along
    an axis, not of each channel: (p - start) // stride and (p - start) % stride // block give its channel.
    """
    dropped = torch.zeros(entry.site.width, dtype=torch.bool)
    dropped[entry.dropped] = True
    for slot in entry.site.slots:
        tensor = getattr(model.get_submodule(slot.module), slot.attribute)
        position = torch.arange(slot.shape[slot.axis])
        gone = torch.zeros_like(position, dtype=torch.bool)
        for span in slot.spans:
            inside = position - span.start
            if span.repeats > 1:
                inside = torch.where(inside < span.repeats * span.stride, inside % span.stride, -1)
            channel = torch.div(inside, span.block, rounding_mode="floor")
            within = (channel >= 0) & (channel < entry.site.width) & (position >= span.start)
            gone |= within & dropped[channel.clamp(0, entry.site.width - 1)]
        tensor.index_fill_(slot.axis, gone.nonzero().flatten().to(tensor.device), 0)
