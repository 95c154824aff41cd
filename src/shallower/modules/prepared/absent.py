"""What stands in the place of a branch that is gone.

perform(model, Absent("model.layers.3.mlp"))        # gives zeros
perform(model, Absent("blocks.3", passes=True))     # gives what it reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from shallower.core.codec import Bounds

SIZES = ("returns", "channels", "stride")
"""Whole numbers of what stands here that are sizes, and the number of nothing."""


class Zeros(nn.Module):
    """Zeros like the first tensor that it is given, in the place of a module of a dropped branch.

        Zeros()(torch.randn(2, 8, 16))                              # (2, 8, 16)
        Zeros(channels=32, stride=2)(torch.randn(2, 16, 8, 8))      # (2, 32, 4, 4)

    Args:
        returns: values of the tuple that it returns, zeros and then None; 0 for a bare tensor.
        channels: of an image that it gives; 0 for as many as it reads.
        stride: by what height and width are divided then.
        cache: the layer of a KV cache that the module filled. It holds one number for each token then: how many tokens
            there were is read off the first layers of a cache. -1 where there is none.
        held: see `Absent`.
    """

    def __init__(self, returns: int = 0, channels: int = 0, stride: int = 1, cache: int = -1, held: str = "") -> None:
        super().__init__()
        _hold_nothing(self, held)
        self.returns = returns
        self.cache = cache
        self.channels = channels
        self.stride = stride

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, with what else the module returned."""
        x = first_tensor((*args, *kwargs.values()))
        _count_tokens(x, (*args, *kwargs.values()), self.cache)
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
        cache: as in `Zeros`.
        held: see `Absent`.
    """

    def __init__(self, returns: int = 0, cache: int = -1, held: str = "") -> None:
        super().__init__()
        _hold_nothing(self, held)
        self.returns = returns
        self.cache = cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor, with what else the layer returned."""
        x = first_tensor((*args, *kwargs.values()))
        _count_tokens(x, (*args, *kwargs.values()), self.cache)
        return _returned(x, self.returns)


def first_tensor(given: Sequence[Any]) -> Tensor:
    """The first tensor among some arguments, and in tuples and lists among them.

    Raises:
        ValueError: there is none.
    """
    for item in given:
        if isinstance(item, Tensor):
            return item
        if isinstance(item, (tuple, list)):
            try:
                return first_tensor(item)
            except ValueError:
                continue
    raise ValueError("a dropped branch is given no tensor")


def _count_tokens(x: Tensor, given: Sequence[Any], number: int) -> None:
    """Let a layer of the KV cache among some arguments know of the tokens of x."""
    if number < 0:
        return
    for item in given:
        cache = getattr(item, "self_attention_cache", item)
        if hasattr(cache, "update") and hasattr(cache, "get_seq_length"):
            tokens = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(tokens, tokens[..., :0], number)


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
        returns, channels, stride, cache: as in `Zeros`.
        passes: whether it is a layer, which passes on what it reads.
        held: a tensor of the module, by its name in it. An empty buffer takes its place: a class that has the module
            refuses the file then, and does not make up weights for it.
    """

    name: Annotated[str, Bounds(1, 1000)]
    returns: Annotated[int, Bounds(0, 64)] = 0
    channels: Annotated[int, Bounds(0, 2**24)] = 0
    stride: Annotated[int, Bounds(1, 2**10)] = 1
    passes: bool = False
    cache: Annotated[int, Bounds(-1, 2**16)] = -1
    held: Annotated[str, Bounds(0, 1000)] = ""
    edit: Literal["absent"] = field(default="absent", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the module."""
        made: nn.Module = Zeros(self.returns, self.channels, self.stride, self.cache, self.held)
        if self.passes:
            made = PassedOn(self.returns, self.cache, self.held)
        before = model.get_submodule(self.name)
        made.train(before.training)
        _keep_what_is_read(made, before)
        _leave_fast_paths(model, self.name)
        model.set_submodule(self.name, made)


def _keep_what_is_read(made: nn.Module, before: nn.Module) -> None:
    """What others may read of a module: its type of attention, its number, an eps; the type and device of a weight."""
    for name, value in vars(before).items():
        if isinstance(value, (bool, int, float, str)) and not hasattr(made, name):
            setattr(made, name, value)
    for name, parameter in before._parameters.items():
        held = None if parameter is None else parameter.detach().new_empty(0)
        if name in made._buffers:
            made._buffers[name] = held
        else:
            made.register_buffer(name, held, persistent=False)


def _leave_fast_paths(model: nn.Module, name: str) -> None:
    """Let PyTorch's encoders around a module call it: they hand its weights to one function otherwise."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False
