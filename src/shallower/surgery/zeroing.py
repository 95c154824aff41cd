"""Followed sites simulated: their dropped channels are zero in every tensor in which they stand.

A norm over the channels computes on those that stay, and gives zeros in the others' place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.trees import mapped, tensors
from shallower.modules.edits import Number
from shallower.modules.layers import count_anew
from shallower.modules.prepared.weight_norms import hold_plainly, weight_norms
from shallower.modules.shrinking import fallen
from shallower.planning.entries import Entry
from shallower.sites import Follower, Span


def impose_cuts(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Set the dropped channels of followed sites to zero in every tensor, in place: what cutting them must equal.

    Channels that nothing writes and nothing reads change nothing else.
    """
    given = list(entries)
    for name, norm in _norms(given).items():
        module = model.get_submodule(name)
        module.register_forward_hook(_OnWhatStays(model, name, norm, given), with_kwargs=True)
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


def _norms(entries: Iterable[Entry]) -> dict[str, tuple[int, Tensor]]:
    """The norms over dropped channels by name: the dimension, and which of its positions stay."""
    found: dict[str, tuple[int, Tensor]] = {}
    for entry in entries:
        for norm in entry.site.averages:
            gone = gone_along(entry, norm.spans, norm.size)
            if norm.module in found:
                gone |= ~found[norm.module][1]
            found[norm.module] = (norm.dim, ~gone)
    return found


class _OnWhatStays:
    """Lets a norm compute on some channels only; it gives zeros for the others."""

    def __init__(self, model: nn.Module, name: str, place: tuple[int, Tensor], entries: Iterable[Entry]) -> None:
        self.dim, self.stays = place
        part = copy.deepcopy(model.get_submodule(name))
        for entry in entries:
            for slot in entry.site.slots:
                if f"{slot.module}.".startswith(f"{name}."):
                    _leave(part, slot.module[len(name) + 1 :], slot.attribute, slot.axis, self.stays)
            # of channels that are no part of an average, whole groups for instance, all are there
            averaged = any(norm.module == name for norm in entry.site.averages)
            within: list[Follower] = []
            for follower in entry.site.followers:
                if averaged and f"{follower.module}.".startswith(f"{name}."):
                    within.append(replace(follower, module=follower.module[len(name) + 1 :]))
            for edit in fallen(part, within, entry.site.width, len(entry.dropped)):
                if isinstance(edit, Number):
                    edit.perform(part, model)
                else:
                    edit.perform(part)
        # in a list: the hook is copied with its module, and this is no child of it
        self.part = [part.eval()]

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stays = self.stays.nonzero().flatten()
        args, kwargs = mapped(lambda x: x.index_select(self.dim, stays.to(x.device)), (args, kwargs))
        made = tensors(self.part[0](*args, **kwargs))

        def among_zeros(y: Tensor) -> Tensor:
            return torch.zeros_like(y).index_copy(self.dim % y.dim(), stays.to(y.device), next(made))

        return mapped(among_zeros, output)


def _leave(part: nn.Module, name: str, attribute: str, axis: int, stays: Tensor) -> None:
    """Leave of a norm's vector what stays."""
    holder = part.get_submodule(name)
    tensor = getattr(holder, attribute)
    if tensor.shape[axis] != len(stays):  # the entries of two sites name it; the first has done it
        return
    smaller = tensor.detach().movedim(axis, 0)[stays.to(tensor.device)].movedim(0, axis)
    if attribute in holder._parameters:
        holder._parameters[attribute] = nn.Parameter(smaller)
    else:
        holder._buffers[attribute] = smaller
    count_anew(holder)
