"""What stands in the place of a branch that is gone.

perform(model, Absent("model.layers.3.mlp"))        # gives zeros
perform(model, Absent("blocks.3", passes=True))     # gives what it reads
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from shallower.core.codec import Bounds
from shallower.core.trees import tensors


class Zeros(nn.Module):
    """Zeros like the first tensor that it is given, in the place of a module of a dropped branch.

        Zeros()(torch.randn(2, 8, 16))                              # (2, 8, 16)
        Zeros(channels=32, stride=2)(torch.randn(2, 16, 8, 8))      # (2, 32, 4, 4)

    Args:
        returns: values of the tuple that it returns, zeros and then None; 0 for a bare tensor.
        channels: of an image that it gives; 0 for as many as it reads.
        stride: by what height and width are divided then.
        held: see `Absent`.
    """

    def __init__(self, returns: int = 0, channels: int = 0, stride: int = 1, held: str = "") -> None:
        super().__init__()
        _hold_nothing(self, held)
        self.returns = returns
        self.channels = channels
        self.stride = stride

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, with what else the module returned."""
        x = next(tensors((args, kwargs)))
        return _returned(self._zeros(x), self.returns)

    def _zeros(self, x: Tensor) -> Tensor:
        if not self.channels:
            return torch.zeros_like(x)
        height, width = x.shape[2:]
        size = ((height + self.stride - 1) // self.stride, (width + self.stride - 1) // self.stride)
        return x.new_zeros(x.shape[0], self.channels, *size)

    def extra_repr(self) -> str:
        """The sizes, where they are not those of the input."""
        return f"channels={self.channels}, stride={self.stride}" if self.channels else ""


class PassedOn(nn.Module):
    """The first tensor that it is given, in the place of a dropped layer.

        PassedOn()(x)

    Args:
        returns: values of the tuple that it returns, the tensor and then None; 0 for a bare tensor.
        held: see `Absent`.
    """

    def __init__(self, returns: int = 0, held: str = "") -> None:
        super().__init__()
        _hold_nothing(self, held)
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor, with what else the layer returned."""
        return _returned(next(tensors((args, kwargs))), self.returns)


def _returned(first: Tensor, returns: int) -> Any:
    if not returns:
        return first
    return (first, *[None] * (returns - 1))


def _hold_nothing(module: nn.Module, name: str) -> None:
    """Give a module an empty buffer of a dotted name."""
    first, _, rest = name.partition(".")
    if rest:
        module.add_module(first, nn.Module())
        _hold_nothing(module.get_submodule(first), rest)
    elif first:
        module.register_buffer(first, torch.empty(0))


@dataclass(frozen=True)
class Absent:
    """A module of a dropped branch gives zeros, or passes on what it reads.

    Attributes:
        name: of the module.
        returns, channels, stride: as in `Zeros`.
        passes: whether it is a layer, which passes on what it reads.
        held: a tensor of the module, by its name in it. An empty buffer takes its place: a class that has the module
            refuses the file then, and does not make up weights for it.
    """

    name: Annotated[str, Bounds(1, 1000)]
    returns: Annotated[int, Bounds(0, 64)] = 0
    channels: Annotated[int, Bounds(0, 2**24)] = 0
    stride: Annotated[int, Bounds(1, 2**10)] = 1
    passes: bool = False
    held: Annotated[str, Bounds(0, 1000)] = ""
    edit: Literal["absent"] = field(default="absent", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the module."""
        made: nn.Module = Zeros(self.returns, self.channels, self.stride, self.held)
        if self.passes:
            made = PassedOn(self.returns, self.held)
        made.train(model.get_submodule(self.name).training)
        model.set_submodule(self.name, made)
