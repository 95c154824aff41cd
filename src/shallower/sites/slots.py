"""Where the channels of a site stand in the tensors of a model: everything that has to be cut with them.

slot = Slot("layer1.0.conv1.weight", (64, 64, 3, 3), 0, (Span(0, 1, 0, 1),))
slot.positions(torch.tensor([0, 5]))    # rows 0 and 5
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import torch
from torch import Tensor

from shallower.core.codec import Bounds
from shallower.sites.parts import MOST_CHANNELS, Channels, Count, Macs, Name

MOST_SPANS = 1024


@dataclass(frozen=True)
class Span:
    """Positions that the channels of a site have along an axis.

        sh.Span(start=0, repeats=1, stride=0, block=64)         # heads of 64 features side by side

    Channel c has start + i * stride + c * block + j, for every i below `repeats` and j below `block`: several
    positions side by side where an image was flattened or a channel is a head, several stretches where the axis holds
    the channels more than once.
    """

    start: Count
    repeats: Channels
    stride: Count
    block: Channels


def positions_of(spans: Iterable[Span], channels: Tensor) -> Tensor:
    """The positions that these channels have, (m,) int64, ascending."""
    found = [torch.empty(0, dtype=torch.int64)]
    for span in spans:
        starts = span.start + torch.arange(span.repeats) * span.stride
        own = channels.cpu()[:, None] * span.block + torch.arange(span.block)
        found.append((starts[:, None] + own.flatten()).flatten())
    return torch.cat(found).sort().values


def positions_each(spans: Iterable[Span]) -> int:
    """How many positions each channel has."""
    return sum(span.repeats * span.block for span in spans)


def hold(spans: Iterable[Span], width: int, size: int) -> bool:
    """Whether that many channels lie within `size` positions, each position once."""
    used = 0
    for span in spans:
        last = span.start + (span.repeats - 1) * span.stride + width * span.block
        apart = span.repeats == 1 or span.stride >= width * span.block
        if last > size or not apart:
            return False
        used += span.repeats * width * span.block
    return 0 < used <= size


@dataclass(frozen=True)
class ChannelCall:
    """A call that reads channels along one dimension.

        [call.function for call in (*site.averages, *site.choices)]

    Attributes:
        module: dotted name of a module during whose forward the call is made; "" for the model.
        function: canonical name of what is called.
        ordinal: how many calls of that name come before it in this forward, made by the module or those it calls.
        dim: dimension that holds the channels in what the call reads, counted from its end.
        size: of that dimension.
        spans: where the channels stand along it.
    """

    module: Name
    function: Name
    ordinal: Count
    dim: Annotated[int, Bounds(-8, -1)]
    size: Channels
    spans: Annotated[tuple[Span, ...], Bounds(1, MOST_SPANS)]


@dataclass(frozen=True)
class Average(ChannelCall):
    """A call that takes an average over the channels: that of a norm, mostly.

        [average.module for average in site.averages]

    After a cut it is the average of the channels that stay: simulation lets the call read only these. Attributes as
    in `ChannelCall`.
    """


@dataclass(frozen=True)
class Choice(ChannelCall):
    """A call that chooses among the channels or divides shares among them: top-k or softmax over the experts.

        [choice.function for choice in site.choices]

    A channel that is dropped is never chosen: simulation lets the call read minus infinity there.

    Attributes:
        module, function, ordinal, dim, size, spans: as in `ChannelCall`.
        least: how many positions must remain along the dimension.
    """

    least: Channels = 1


@dataclass(frozen=True)
class Listed:
    """A list of modules, or a dict of them, whose entries are the channels of a site: its experts.

        [listed.module for listed in site.lists]

    Attributes:
        module: dotted name.
        params: parameters of each entry.
    """

    module: Name
    params: Macs


@dataclass(frozen=True)
class Slot:
    """An axis of a parameter or buffer in which the channels of a site stand.

        [(slot.tensor, slot.axis) for slot in site.slots if slot.side == "rows"]        # what writes the channels

    Attributes:
        tensor: dotted name.
        shape: of the tensor, as the site was found.
        axis: which of its axes.
        spans: where along the axis.
        side: "columns" where a linear map adds up the channels along this axis, "rows" where it makes them, else "".
        trained: whether the tensor is a parameter, not a buffer.
        uses: how often each number of a linear map's weight is multiplied in one forward pass on the example inputs.
        output: the dimension of the module's output that holds its rows, where the module is a plain linear layer; 0
            for others.
        shared_out: whether the tensor is a stack of matrices, of experts, which share out the rows that are multiplied
            with them; `uses` is then that of all of them together, and stays where there are fewer.
    """

    tensor: Name
    shape: Annotated[tuple[Channels, ...], Bounds(1, 16)]
    axis: Count
    spans: Annotated[tuple[Span, ...], Bounds(1, MOST_SPANS)]
    side: Literal["", "rows", "columns"] = ""
    trained: bool = True
    uses: Macs = 0
    output: Annotated[int, Bounds(-1, 1)] = 0
    shared_out: bool = False

    @property
    def module(self) -> str:
        """Dotted name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """What the module calls it."""
        return self.tensor.rpartition(".")[2]

    def macs(self, shape: tuple[int, ...]) -> int:
        """Multiply-accumulate operations of the maps where the tensor has this shape."""
        return self.uses * prod(shape[1:] if self.shared_out else shape)

    def holds(self, width: int) -> bool:
        """Whether that many channels lie within the axis, each position once."""
        return self.axis < len(self.shape) and hold(self.spans, width, self.shape[self.axis])

    def positions(self, channels: Tensor) -> Tensor:
        """The positions along the axis that these channels have, (m,) int64, ascending."""
        return positions_of(self.spans, channels)


@dataclass(frozen=True)
class Written:
    """A number that a call is given, where the call is written in the forward of a module or in what that calls.

        sh.Written((("window_partition(x, self.window)", 0), ("x.view(B, H // ws, ws, W // ws, ws, C)", 0)), 6, 96)

    Attributes:
        path: texts of calls, of each how many calls of the same text come before it in its function: the first stands
            in the forward, each further one in the function that the one before it calls; the last is given the number.
        place: which of what the call is given, counted from 0, or from the end where it is below 0; sequences count by
            what is in them, a slice is three.
        value: the number, as the site was found; -1 for a size that becomes whatever the others leave.
    """

    path: Annotated[tuple[tuple[Annotated[str, Bounds(1, 1000)], Count], ...], Bounds(1, 16)]
    place: Annotated[int, Bounds(-1024, MOST_CHANNELS)]
    value: Annotated[int, Bounds(-MOST_CHANNELS, MOST_CHANNELS)] | float


@dataclass(frozen=True)
class Follower:
    """A whole number that falls with the channels, one that a module holds or that a call in its forward is given.

        [(follower.module, follower.attribute) for follower in site.followers if follower.written is None]

    Attributes:
        module: dotted name.
        attribute: of the module; "" where the number is written.
        each: by how much it falls for each channel that goes; 0 for a number that is written because it must not fall.
        written: the call, and which of its numbers.
    """

    module: Name
    attribute: Name
    each: Count
    written: Written | None = None

    @property
    def place(self) -> tuple[str, str]:
        """The module and the attribute."""
        return self.module, self.attribute
