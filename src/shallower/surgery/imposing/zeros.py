"""Followed sites simulated: their dropped channels are zero in every tensor in which they stand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shallower.modules.prepared.weight_norms import hold_plainly, weight_norms
from shallower.planning.entries import Entry
from shallower.sites import Span


def impose_cuts(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Set the dropped channels of followed sites to zero in every tensor, in place: what cutting them must equal.

    Channels that nothing writes and nothing reads change nothing else.
    """
    given = list(entries)
    named = {slot.tensor for entry in given for slot in entry.site.slots}
    for weight in list(weight_norms(model)):
        if weight.direction in named:  # its length would be another without what goes, and all that stays larger
            hold_plainly(model, weight)
    with torch.no_grad():
        for entry in given:
            for slot in entry.site.slots:
                tensor = getattr(model.get_submodule(slot.module), slot.attribute)
                if 0 in tensor.stride():  # expanded: its positions are one number, which is not zero for all
                    tensor.data = tensor.data.clone()
                gone = gone_along(entry, slot.spans, slot.shape[slot.axis]).nonzero().flatten()
                tensor.index_fill_(slot.axis, gone.to(tensor.device), 0)


def gone_along(entry: Entry, spans: Iterable[Span], size: int) -> Tensor:
    """Which positions along an axis a site's dropped channels have, (size,) bool.

    Asked of each position, not of each channel: (p - start) // stride and (p - start) % stride // block give its
    channel.
    """
    width = entry.site.width
    dropped = torch.zeros(width, dtype=torch.bool)
    dropped[entry.dropped] = True
    position = torch.arange(size)
    gone = torch.zeros(size, dtype=torch.bool)
    for span in spans:
        inside = position - span.start
        if span.repeats > 1:
            inside = torch.where(inside < span.repeats * span.stride, inside % span.stride, -1)
        channel = torch.div(inside, span.block, rounding_mode="floor")
        within = (channel >= 0) & (channel < width) & (position >= span.start)
        gone |= within & dropped[channel.clamp(0, width - 1)]
    return gone
