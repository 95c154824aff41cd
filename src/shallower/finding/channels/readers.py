"""The linear layers that read the channels of a space and nothing else: what can be fitted to those that stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from shallower.modules.forwards import foreign
from shallower.modules.layers import is_conv1d
from shallower.sites import LinearMap, Slot, Span


def plain_readers(
    model: nn.Module, slots: Iterable[Slot], width: int, calls: Mapping[str | None, int]
) -> tuple[LinearMap, ...]:
    """The layers whose columns the channels are, each channel as many of them; none where something else reads them.

    Args:
        model: whose layers they are.
        slots: where the channels stand.
        width: how many there are.
        calls: how often the pass calls a module, by name; of others a forward reads the weights alone.
    """
    found: list[LinearMap] = []
    for slot in slots:
        if slot.side != "columns":
            continue
        if not calls.get(slot.module):
            return ()
        reader = _reader(model.get_submodule(slot.module), slot, width)
        if reader is None:
            return ()
        if found and (reader.d_in, calls[reader.name]) != (found[0].d_in, calls[found[0].name]):
            return ()
        found.append(reader)
    return tuple(found)


def _reader(layer: nn.Module, slot: Slot, width: int) -> LinearMap | None:
    """A plain linear layer all of whose columns the channels are; None for others."""
    kind: Literal["linear", "conv1d"] = "linear"
    if is_conv1d(layer):
        kind = "conv1d"
    elif type(layer).forward is not nn.Linear.forward:
        return None
    if slot.attribute != "weight" or len(slot.shape) != 2 or foreign(layer):
        return None
    d_in, d_out = slot.shape[slot.axis], slot.shape[1 - slot.axis]
    if slot.spans != (Span(0, 1, 0, d_in // width),):
        return None
    return LinearMap(slot.module, kind, d_in, d_out, getattr(layer, "bias", None) is not None, slot.uses)
