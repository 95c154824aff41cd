"""What a site consists of, by name: places, linear maps, sums, depthwise convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from shallower.core.codec import Bounds

MOST_CHANNELS = 1 << 24

Name = Annotated[str, Bounds(0, 1000)]
Count = Annotated[int, Bounds(0, MOST_CHANNELS)]
Channels = Annotated[int, Bounds(1, MOST_CHANNELS)]
Macs = Annotated[int, Bounds(0, 1 << 53)]
Sizes = tuple[Annotated[int, Bounds(0, 1 << 16)], Annotated[int, Bounds(0, 1 << 16)]]
Steps = tuple[Annotated[int, Bounds(1, 1 << 16)], Annotated[int, Bounds(1, 1 << 16)]]
"""What a file may hold in these fields; see core/codec."""


@dataclass(frozen=True)
class Place:
    """Where a pointwise operation stands in the model: something that can be exchanged for another module.

    Attributes:
        module: dotted name. With no `calls`, the module that is the operation. With `calls`, the module whose
            own `forward` makes these calls.
        calls: the calls, in order of execution: (name, ordinal). The name is the canonical function name ("relu",
            "gelu", "mul") or, for one of several calls of a child module, "self." and the child's name relative to
            `module`. The ordinal counts calls of that name that `module`'s own forward makes in one invocation,
            from 0.
    """

    module: Name
    calls: tuple[tuple[Name, Count], ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the modules that are called there: the operation itself, or children; none for functions."""
        if not self.calls:
            return (self.module,)
        names: list[str] = []
        for call, _ in self.calls:
            if call.startswith("self."):
                names.append(f"{self.module}.{call.removeprefix('self.')}".strip("."))
        return tuple(names)

    def __str__(self) -> str:
        if not self.calls:
            return self.module
        name, ordinal = self.calls[0]
        return f"{self.module or 'model'}:{name}#{ordinal}"


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the model, by the dotted name of its module.

    Attributes:
        name: dotted name.
        kind: `nn.Linear`, Transformers' transposed `Conv1D`, or `nn.Conv2d`.
        d_in, d_out: features or channels.
        bias: whether it has one.
        positions: rows it is applied to in one forward pass on the example inputs, all calls together (tokens of
            the batch; for a convolution, output pixels of the batch).
        kernel, stride, padding, dilation, groups: of a convolution; neutral otherwise.
        size: height and width of the images that a convolution reads, or that were flattened into what a linear layer
            behind convolutions reads; (0, 0) for other linear layers, and where images of several sizes come.
    """

    name: Annotated[str, Bounds(1, 1000)]
    kind: Literal["linear", "conv1d", "conv2d"]
    d_in: Channels
    d_out: Channels
    bias: bool
    positions: Macs
    kernel: Steps = (1, 1)
    stride: Steps = (1, 1)
    padding: Sizes = (0, 0)
    dilation: Steps = (1, 1)
    groups: Channels = 1
    size: Sizes = (0, 0)

    @property
    def taps(self) -> int:
        """Kernel positions: 1 for a linear layer, 9 for a 3x3 convolution."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.d_in // self.groups * self.d_out * self.taps

    @property
    def params(self) -> int:
        """Weights and bias."""
        return self.weights + self.d_out * self.bias

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations on the example inputs, all calls together."""
        return self.positions * self.weights


def by_name(maps: Iterable[LinearMap]) -> dict[str, LinearMap]:
    """Linear maps by their names, each once, in the order given."""
    return {m.name: m for m in maps}


class Tally(NamedTuple):
    """What some linear maps have together."""

    weights: int
    params: int
    macs: int


def tally(maps: Iterable[LinearMap]) -> Tally:
    """Weights, parameters and MACs of some linear maps together.

    tally(site.maps).macs
    """
    weights = params = macs = 0
    for m in maps:
        weights += m.weights
        params += m.params
        macs += m.macs
    return Tally(weights, params, macs)


@dataclass(frozen=True)
class Residual:
    """The sum that closes right around a site: site(x) + x, with the very x that the site reads.

    Where all channels of the site are linear, the skip folds into the merged map, and the sum can go.

    Attributes:
        place: the call that adds. Made a module (`externalise`), it is called with the two summands in the order in
            which the forward has them.
        branch: which summand is the site's output, 0 or 1.
        norm: BatchNorm between the site's consumer and the sum, "" if there is none.
        source: the map that reads the x of the sum: the site's own producer; or, of the last site in a chain (the
            consumer of one is the producer of the next), the producer of the first, where the skip folds once the whole
            chain is linear.
    """

    place: Place
    branch: Annotated[int, Bounds(0, 1)]
    norm: Name = ""
    source: Name = ""


@dataclass(frozen=True)
class Between:
    """A depthwise convolution on the way from a site's activation to its consumers.

    It maps every hidden channel to itself, so that channel j goes with it: its filter, its entry in the norms.

        ... activation - norm_after - [map - norm_before - activation - norm_after] - consumers

    Attributes:
        map: the convolution; groups, input and output channels are all the site's width.
        norm_before: BatchNorm between it and the activation behind it (or behind it, where there is no activation).
        activation: where the activation behind it is; None where there is none.
        activation_name: what that is, for people.
        norm_after: BatchNorm behind that activation.
        activation_params: parameters of the activation itself.
    """

    map: LinearMap
    norm_before: Name = ""
    activation: Place | None = None
    activation_name: Name = ""
    norm_after: Name = ""
    activation_params: Count = 0
