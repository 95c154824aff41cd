"""A branch: F of x + F(x), or a whole layer whose output has the form of its input, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shallower.core.codec import Bounds
from shallower.sites.parts import Count, Macs, Name

Stride = Annotated[int, Bounds(1, 1 << 10)]
Returned = Annotated[int, Bounds(0, 64)]
Cached = Annotated[int, Bounds(-1, 1 << 16)]


@dataclass(frozen=True)
class Emptied:
    """A module of a branch that goes.

        [gone.module for gone in site.branch.emptied]

    Attributes:
        module: dotted name.
        returns: how many values it returns in a tuple, of which the first is the tensor that counts; 0 where it returns
            that tensor itself.
        cache: the number of the layer of a KV cache that it fills, -1 where it fills none.
    """

    module: Name
    returns: Returned = 0
    cache: Cached = -1


@dataclass(frozen=True)
class Branch:
    """What goes where a branch is dropped.

        sites["model.layers.3.mlp:branch"].branch.params

    Attributes:
        emptied: the modules of F, in order of execution, each called once. Of a layer, the layer.
        closing: dotted name of the one whose output, through operations that keep zeros, is F(x); it gives zeros
            instead. "" for a layer, in whose place x itself goes on.
        channels, stride: of an image that F gives with other sizes than it reads: its channels, and by what its height
            and width are divided. 0 and 1 where the sizes are those of x.
        params: parameters of the modules that go and that nothing else uses.
        macs: MACs that go, on the example inputs.
    """

    emptied: Annotated[tuple[Emptied, ...], Bounds(1, 1000)]
    closing: Name = ""
    channels: Count = 0
    stride: Stride = 1
    params: Annotated[int, Bounds(0, 1 << 53)] = 0
    macs: Macs = 0

    @property
    def layer(self) -> str:
        """The layer that goes as a whole, "" where it is a branch in one."""
        if self.closing:
            return ""
        return self.emptied[0].module
