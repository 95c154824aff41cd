"""The residual sum that a layer's output goes into, found while the model runs.

    with ResidualSums() as sums:
        ...                         # the layer's forward hook calls sums.follow(output)
    sums.others                     # what was added to each output, in the output's own layout and scale

What else enters the sum tells by how much a network that was changed further up is off at this point, so that a layer
can be fitted to make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Inverse = Callable[[Tensor], Tensor]

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_UNCHANGED = frozenset({"dropout", "dropout_", "contiguous", "dropout1d", "dropout2d", "feature_dropout"})
_RESHAPED = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
_SCALED = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})
_LEAST_SCALE = 1e-2


class ResidualSums(TorchFunctionMode):
    """Follows tensors through dropout, layer scales, BatchNorm, reshapes and transpositions to the next addition.

    Attributes:
        others: for each followed tensor, in order, what was added to it, brought back to the tensor's layout and
            divided by the scales in between; None where it went elsewhere first. Where a channel's scale is tiny beside
            the others' the division gives 0.
        units: for each followed tensor, in its own layout and shape, what the division makes of ones: 1 over the
            scales in between. None where it went elsewhere, and where `measure` is false.
        followed: by identity, what is looked out for: the tensor, its number, and the way back to what it was.
        keep: what of each of the others is kept; by default all.
    """

    def __init__(self, measure: bool = False) -> None:
        super().__init__()
        self.measure = measure
        self.keep: Callable[[Tensor], Tensor] = lambda t: t
        self.units: list[Tensor | None] = []
        self.others: list[Tensor | None] = []
        self.followed: dict[int, tuple[Tensor, int, list[Inverse]]] = {}

    def follow(self, tensor: Tensor) -> None:
        """Look out for this tensor from now on."""
        self.followed[id(tensor)] = (tensor, len(self.others), [])
        self.others.append(None)
        self.units.append(None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and see whether it reads a followed tensor."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        found = next((a for a in args if isinstance(a, Tensor) and id(a) in self.followed), None)
        if found is None or name == "__get__":
            return func(*args, **kwargs)
        _, index, inverses = self.followed[id(found)]
        if name in _SUMS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            other = _beside(found, args)
            if isinstance(other, Tensor) and other.shape == found.shape and id(other) not in self.followed:
                before = other.detach()
                if name in ("add_", "__iadd__"):
                    before = before.clone()
                unit: Tensor | None = None
                if self.measure:
                    unit = torch.ones_like(before)
                for inverse in reversed(inverses):
                    before = inverse(before)
                    if unit is not None:
                        unit = inverse(unit)
                self.others[index], self.units[index] = self.keep(before), unit
            del self.followed[id(found)]
            return func(*args, **kwargs)
        back = _inverse(name, found, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            del self.followed[id(found)]
            if back is not None:
                self.followed[id(result)] = (result, index, [*inverses, back])
        return result


def _beside(tensor: Tensor, pair: tuple[Any, ...]) -> Any:
    """The other of two arguments."""
    if pair[0] is tensor:
        return pair[1]
    return pair[0]


def _inverse(name: str, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inverse | None:
    """What takes the result of this call back to `tensor`; None where that is not known."""
    if name in _UNCHANGED:
        return lambda t: t
    if name in _RESHAPED:
        shape = tensor.shape
        return lambda t: t.reshape(shape)
    if name == "permute":
        dims = args[1:] or (kwargs["dims"],)
        if len(dims) == 1 and not isinstance(dims[0], int):
            dims = dims[0]
        # the inverse of a permutation sorts it
        order = [d % tensor.dim() for d in dims]
        back = sorted(range(len(order)), key=order.__getitem__)
        return lambda t: t.permute(back)
    if name in ("transpose", "swapaxes") and len(args) == 3:
        first, second = args[1], args[2]
        return lambda t: t.transpose(first, second)
    if name == "batch_norm":
        return _batch_norm(args, kwargs)
    if name in _SCALED and len(args) == 2:
        factor = _beside(tensor, args)
        if isinstance(factor, (int, float)) and math.isfinite(factor) and factor != 0:
            return lambda t: t / factor
        if isinstance(factor, torch.nn.Parameter) and factor.dim() <= tensor.dim():
            scale = _guarded(factor.detach())
            return lambda t: t / scale
    return None


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inverse | None:
    """Of `F.batch_norm`, in eval mode."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or given.get("training", False) or given.get("running_var") is None:
        return None
    # scale y + shift + other = scale (y + other / scale) + shift: the shift plays no part
    scale = torch.rsqrt(given["running_var"].detach() + given.get("eps", 1e-5))
    if given.get("weight") is not None:
        scale = scale * given["weight"].detach()
    scale = _guarded(scale).reshape(1, -1, *[1] * (given["input"].dim() - 2))
    return lambda t: t / scale


def _guarded(scale: Tensor) -> Tensor:
    """The scale, infinite where it is tiny beside the others."""
    size = scale.abs()
    return torch.where(size > _LEAST_SCALE * size.median(), scale, torch.inf)
