"""What reads the channels of a coupled site, and can be fitted anew when some of them go.

    not_squeezed(site)                      # None, or why squeezing leaves such a site as it is
    for reader in readers_of(model, site):
        reader.site.consumers[0], reader.columns(torch.arange(site.width))

A site is coupled where its channels were followed and no plain linear layer reads them alone: the stream of a
convolution stage, or the channels of an inverted residual whose convolutions have a forward of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.patches import patches, unusual_padding
from shallower.errors import Refusal, SiteError
from shallower.sites import LinearMap, Site, Slot, Span


@dataclass(frozen=True)
class Reader:
    """A layer that adds up the channels of a coupled site, and perhaps those of others.

    Attributes:
        site: all columns of the layer as one site, which keeps every channel and is fitted.
        slot: where the coupled site's channels stand among the columns.
    """

    site: Site
    slot: Slot

    @property
    def map(self) -> LinearMap:
        """The layer."""
        return self.site.consumers[0]

    def columns(self, channels: Tensor) -> Tensor:
        """(channels, columns each) of what the layer reads at a position, the taps of a channel beside one another."""
        taps = torch.arange(self.map.taps)
        rows: list[Tensor] = []
        for channel in channels:
            own = self.slot.positions(channel[None])
            rows.append((own[:, None] * self.map.taps + taps).flatten())
        return torch.stack(rows)


def is_coupled(site: Site) -> bool:
    """Whether a site is to be squeezed by what reads its channels, wherever that is."""
    return site.followed and not site.consumers


def not_squeezed(site: Site) -> Refusal | None:
    """Why squeezing cannot choose among a site's channels and fit what reads them; None where it can."""
    if is_coupled(site):
        return not_coupled(site)
    return site.bridge.not_refitted


def not_coupled(site: Site) -> Refusal | None:
    """Why a followed site cannot be squeezed by what reads its channels; None where it can."""
    if not is_coupled(site):
        return Refusal("it has layers by name that make its channels and read them")
    if site.averages:
        return Refusal("a norm averages over its channels; a plan by hand can narrow it (Entry.narrow)")
    if site.choices or site.lists:
        return Refusal("its channels are chosen among; a plan by hand can narrow it (Entry.narrow)")
    if site.width < 2:
        return Refusal("it has one channel")
    if all(len(slot.shape) < 4 for slot in site.slots):  # the channels of values within heads, for instance
        return Refusal("no convolution is among its layers; a plan by hand can narrow it (Entry.narrow)")
    read = [slot for slot in site.slots if slot.side == "columns"]
    if not read:
        return Refusal("no layer reads its channels by its weights; a plan by hand can narrow it (Entry.narrow)")
    for slot in read:
        if slot.attribute != "weight" or slot.axis != 1 or len(slot.shape) not in (2, 4) or not slot.output:
            return Refusal(
                f"`{slot.tensor}` reads its channels, and is no plain linear layer or convolution; a plan by hand can "
                "narrow it (Entry.narrow)"
            )
    return None


def readers_of(model: nn.Module, site: Site) -> list[Reader]:
    """The layers that read a coupled site's channels.

    Raises:
        SiteError: one of them is no layer whose geometry is known.
    """
    found: list[Reader] = []
    for slot in site.slots:
        if slot.side == "columns":
            found.append(Reader(_read_alone(site, model.get_submodule(slot.module), slot), slot))
    return found


def reads_as_described(module: nn.Module, m: LinearMap, x: Tensor, y: Tensor) -> bool:
    """Whether the layer's output y is its weight times the patches of what it read, x."""
    with torch.no_grad():
        weight: Any = module.weight
        rows = patches(x, m) @ weight.flatten(1).T
        if isinstance(module.bias, Tensor):
            rows = rows + module.bias
        given = y.movedim(1, -1) if m.kind == "conv2d" else y
        given = given.reshape(-1, given.shape[-1])
        return rows.shape == given.shape and bool((rows - given).norm() <= _SAME * given.norm())


_SAME = 1e-3


def _read_alone(site: Site, layer: nn.Module, slot: Slot) -> Site:
    """A site of all columns of a layer."""
    bias = isinstance(getattr(layer, "bias", None), Tensor)
    m = LinearMap(slot.module, "linear", slot.shape[1], slot.shape[0], bias, slot.uses)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        padding: Callable[[Tensor], Tensor] | None = unusual_padding(layer)
        pads = (0, 0)
        if padding is None and not isinstance(layer.padding, str):
            pads = _as_pair(layer.padding)
        m = LinearMap(
            slot.module,
            "conv2d",
            slot.shape[1],
            slot.shape[0],
            bias,
            slot.uses,
            _as_pair(layer.kernel_size),
            _as_pair(layer.stride),
            pads,
            _as_pair(layer.dilation),
        )
    elif not isinstance(layer, nn.Linear):
        raise SiteError(f"{site.name}: `{slot.module}` reads its channels and is a {type(layer).__name__}")
    every = Slot(slot.tensor, slot.shape, 1, (Span(0, 1, 0, 1),), "columns", slot.trained, slot.uses, slot.output)
    return Site(
        f"{slot.module}:columns",
        "hidden",
        slot.shape[1],
        None,
        (m,),
        None,
        channels_first=m.kind == "conv2d",
        slots=(every,),
    )


def _as_pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))
