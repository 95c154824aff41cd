"""Weights that are computed of a length and a direction, w = g v / |v|: what remains of them stays as it is.

    for norm in weight_norms(model):
        print(norm.length, norm.direction, norm.dim)

Where a direction loses channels it becomes shorter, and its length has to follow, or all other numbers of the weight
would grow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True)
class Normed:
    """A weight of a layer that is computed so.

    Attributes:
        layer, weight: dotted name of the layer, and what it calls the weight.
        length, direction: dotted names of the parameters.
        dim: the dimension that has a length for each position; -1 where there is one length.
    """

    layer: str
    weight: str
    length: str
    direction: str
    dim: int

    def resized(self, length: Tensor, direction: Tensor, cut: Tensor) -> Tensor:
        """The lengths with which the cut direction gives the numbers that the whole one gives there.

        Args:
            length: (..., n, ...), cut along `dim` already.
            direction: whole, or cut along `dim` only.
            cut: what is left of it.
        """
        before, after = (torch.norm_except_dim(v.double(), 2, self.dim) for v in (direction, cut))
        return (length.double() * after / before).to(length.dtype)


def weight_norms(model: nn.Module) -> Iterator[Normed]:
    """All weights that PyTorch's own weight norms compute, of either kind."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for weight, own in parametrizations_of(module).items():
            first = own[0]
            if isinstance(first, _WeightNorm):
                held = f"{prefix}parametrizations.{weight}."
                yield Normed(name, weight, f"{held}original0", f"{held}original1", first.dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield Normed(name, hook.name, f"{prefix}{hook.name}_g", f"{prefix}{hook.name}_v", hook.dim)


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The weights of a module that are computed of others, by name, and how."""
    found: dict[str, parametrize.ParametrizationList] = {}
    lists = getattr(module, "parametrizations", None)
    if isinstance(lists, nn.ModuleDict):
        for name, own in lists.items():
            if isinstance(own, parametrize.ParametrizationList):
                found[name] = own
    return found


def is_weight_norm(module: nn.Module) -> bool:
    """Whether calls in the frame of this module may be those of PyTorch's own weight norms."""
    return isinstance(module, _WeightNorm) or any(isinstance(h, WeightNorm) for h in module._forward_pre_hooks.values())


class _AsHeld(nn.Module):
    """In the place of a weight norm: the direction is the weight."""

    def forward(self, _: Tensor, direction: Tensor) -> Tensor:
        return direction


@torch.no_grad()
def hold_plainly(model: nn.Module, norm: Normed) -> None:
    """Let a direction be the weight itself, which nothing is computed of any more, in place."""
    layer, held = model.get_submodule(norm.layer), model.get_parameter(norm.direction)
    made = torch._weight_norm(held, model.get_parameter(norm.length), norm.dim)
    own = parametrizations_of(layer).get(norm.weight)
    if own is not None:
        own[0] = _AsHeld()
    for key, hook in layer._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm) and hook.name == norm.weight:
            layer._forward_pre_hooks[key] = functools.partial(_take, norm.weight)
    held.copy_(made)


def _take(weight: str, layer: nn.Module, _: Any) -> None:
    setattr(layer, weight, getattr(layer, f"{weight}_v"))


def place_of_weight(module: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the tensor of the shape of a layer's weight, and what it calls it."""
    own = parametrizations_of(module).get("weight")
    if own is not None:
        return own, "original1" if isinstance(own[0], _WeightNorm) else "original"
    return module, "weight_v" if "weight_v" in module._parameters else "weight"
