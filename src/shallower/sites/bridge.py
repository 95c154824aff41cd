"""What stands between a site's producers and its consumers, as one object that is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from shallower.errors import Refusal
from shallower.sites.parts import LinearMap, Place

Gate = Literal["", "separate", "gate-first", "up-first"]
"""Whether z = f(gate x) * (up x): "" without a gate, "separate" where gate and up projection are two maps, and where
one map makes both, which half of its rows comes first."""


@dataclass(frozen=True)
class Stage:
    """One of the things that a hidden channel passes on its way from the producer to the consumers.

    Attributes:
        kind: norm (a BatchNorm), activation (f itself, or the one behind a depthwise convolution), depthwise (a
            convolution of each channel by itself), pool (a pooling or resizing of the image), average (over all
            pixels), flatten (all pixels side by side, for a linear consumer).
        place: where the module or the call is; None for pool, average and flatten, which have no weights.
        map: the convolution, for "depthwise".
        params: parameters of an activation itself; those of norms are in `Bridge.norm_params`.
        stays: whether these stay in the model when the activation goes here, since other calls use them too.
    """

    kind: Literal["norm", "activation", "depthwise", "pool", "average", "flatten"]
    place: Place | None = None
    map: LinearMap | None = None
    params: int = 0
    stays: bool = False

    @property
    def name(self) -> str:
        """Dotted name of the module; "" where there is none."""
        if self.place is None:
            return ""
        return self.place.module


@dataclass(frozen=True)
class Bridge:
    """What stands between a site's producers and its consumers.

        bridge = site.bridge
        bridge.not_linear                   # None, or the Refusal with the reason
        bridge.columns(kept)                # the consumers' columns that these channels have
        bridge.gate_first, bridge.up_rows(kept), bridge.gate_rows(kept)

    Attributes:
        width: hidden channels, as the site was found.
        stages: what a channel passes, in order. Dropouts are in `site.dropouts`: they do nothing in eval mode.
        gate: see `Gate`.
        block: columns of a consumer that one channel has: those of a head, the pixels of a flattened image, or 1.
        dim: dimension of the hidden tensor that holds the channels: 1 in an image, else -1.
        norm_params: parameters for each channel of all BatchNorms together.
        not_linear: why no channel may become linear; None where channels may.
        not_narrow: why channels cannot be kept and dropped one by one; None where they may.
        not_merged: why producer and consumers stay two layers even where all channels are linear; None where they
            need not.
        not_refitted: why the consumers cannot be fitted anew to the kept channels; None where they can.
    """

    width: int
    stages: tuple[Stage, ...]
    gate: Gate
    block: int
    dim: int
    norm_params: int
    not_linear: Refusal | None
    not_narrow: Refusal | None
    not_merged: Refusal | None
    not_refitted: Refusal | None

    def has(self, kind: str) -> bool:
        """Whether a stage of that kind is among them."""
        return any(stage.kind == kind for stage in self.stages)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the BatchNorms, in order."""
        return tuple(stage.name for stage in self.stages if stage.kind == "norm")

    @property
    def norm_before(self) -> str:
        """Name of the BatchNorm in front of f, which folds with the producer; "" where there is none."""
        if self.stages and self.stages[0].kind == "norm":
            return self.stages[0].name
        return ""

    @property
    def norm_after(self) -> str:
        """Name of the BatchNorm directly behind f, which folds into what reads it; "" where there is none."""
        for stage, behind in pairwise(self.stages):
            if stage.kind == "activation":
                return behind.name if behind.kind == "norm" else ""
        return ""

    @property
    def activations(self) -> tuple[Place, ...]:
        """Where the activations are, in order: f, and those behind depthwise convolutions."""
        return tuple(s.place for s in self.stages if s.kind == "activation" and s.place is not None)

    @property
    def shares_activation(self) -> bool:
        """Whether parameters of f stay in the model when it goes here, since other calls use them too."""
        return any(stage.stays for stage in self.stages)

    @property
    def params(self) -> int:
        """Parameters of the BatchNorms, and of the activations that nothing else uses."""
        return self.width * self.norm_params + sum(stage.params for stage in self.stages if not stage.stays)

    @property
    def depthwise(self) -> tuple[LinearMap, ...]:
        """The depthwise convolutions, in order."""
        return tuple(stage.map for stage in self.stages if stage.map is not None)

    @property
    def gated(self) -> bool:
        """Whether z = f(gate x) * (up x)."""
        return self.gate != ""

    @property
    def packed(self) -> bool:
        """Whether one map gives gate and up projection."""
        return self.gate in ("gate-first", "up-first")

    @property
    def gate_first(self) -> bool:
        """Whether the gate has the first half of a packed map's rows."""
        return self.gate == "gate-first"

    @property
    def image(self) -> bool:
        """Whether the hidden tensor is an image: its channels are in dimension 1."""
        return self.dim == 1

    @property
    def pixelwise(self) -> bool:
        """Whether the consumers read each position of the hidden tensor by itself: no average, pooling or flattening.

        Only then a linear path from the producer's input to the consumers' output can run beside it.
        """
        return not (self.has("average") or self.has("pool") or self.has("flatten"))

    @property
    def direct(self) -> bool:
        """Whether nothing but f and BatchNorms lies between: no depthwise convolution, and `pixelwise`."""
        return self.pixelwise and not self.has("depthwise")

    def pads(self, consumers: Iterable[LinearMap]) -> bool:
        """Whether something is put around what these consumers read, so that a constant in it has a border.

        An average and a pooling leave constants as they are, whatever `not_merged` says.
        """
        # a linear map of a constant is a constant only where nothing else is put around it
        if any(consumer.padding != (0, 0) for consumer in consumers):
            return True
        return self.not_merged is not None and not self.has("average") and not self.has("pool")

    def columns(self, channels: Tensor) -> Tensor:
        """The columns of a consumer that these channels have: block c, ..., block c + block - 1 for channel c."""
        return (channels.cpu()[:, None] * self.block + torch.arange(self.block)).flatten()

    def up_rows(self, channels: Tensor) -> Tensor:
        """The rows of the producer that give these channels (of a packed map, those of the up projection)."""
        if self.gate == "gate-first":
            return channels + self.width
        return channels

    def gate_rows(self, channels: Tensor) -> Tensor:
        """The rows of the gate's map that gate these channels."""
        if self.gate == "up-first":
            return channels + self.width
        return channels

    def split(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up) of what a packed map gives."""
        first, second = made.chunk(2, self.dim)
        if self.gate_first:
            return first, second
        return second, first
