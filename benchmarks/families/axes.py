"""The widths of a network, counted without the finder: which axis of which weight gives channels.

    for width in widths(model, inputs):
        print(width.tensor, width.axis, width.size)

A width is an output axis of a parameter of two or more dimensions that the output depends on. Which axis that is shows
at the operations that PyTorch executes: the rows of a matrix product, the filters of a convolution, the features of an
embedding. A parameter that is added, a bias of each head's features for instance, may give channels along several axes:
it is one width, and all of its numbers count. Axes that are the output's own do not count: changing one position along
them changes other positions of the output than changing another does, as the rows of a classifier and the words of a
vocabulary do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shallower.core.inputs import Inputs

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}
"""Matrix products, and the first of their two factors."""


@dataclass(frozen=True)
class Width:
    """An axis of a parameter whose positions are channels that it gives.

    Attributes:
        tensor: dotted name.
        axis, size: which axis, and how many positions it has.
        numbers: of a parameter that is added, how many numbers it has; else 0.
    """

    tensor: str
    axis: int
    size: int
    numbers: int = 0

    def is_halved(self, now: Tensor) -> bool:
        """Whether half of it went. Where one axis holds several odd widths, a little more than half is left."""
        before, left = self.size, now.shape[self.axis] if self.axis < now.dim() else 0
        if self.numbers:
            before, left = self.numbers, now.numel()
        return left <= max((before + 1) // 2, 0.6 * before)


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def numbers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors of numbers that a model returns; what it draws at random is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return floats(called(model, inputs))


def floats(outputs: Any) -> list[Tensor]:
    """The tensors of numbers among what a model returns."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def widths(model: nn.Module, inputs: Inputs) -> list[Width]:
    """The widths of a model in eval mode, without those of its outputs."""
    _afresh(model)
    watching = _Watching(model)
    with torch.enable_grad(), watching:
        outputs = floats(called(model, inputs))
    read = _read(model, outputs, watching.used)
    shapes = [output.shape for output in outputs]
    found = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name not in read:
            continue
        axis, count = watching.axes.get(name), 0
        if axis is None:
            axis = _usual_axis(model, name)
        if axis is None:
            axis = max((i for i in range(parameter.dim()) if parameter.shape[i] > 1), default=0)
            count = parameter.numel()
        width = Width(name, axis, parameter.shape[axis], count)
        if width.size < 2 or (_may_be_output(width, shapes) and _is_output(model, inputs, width)):
            continue
        found.append(width)
    _afresh(model)
    return found


def _afresh(model: nn.Module) -> None:
    """Have what modules keep of their weights until they train made anew."""
    model.train().eval()


def used(model: nn.Module, inputs: Inputs) -> set[str]:
    """The parameters that some operation reads when the model is called with these inputs."""
    watching = _Watching(model)
    with torch.no_grad(), watching:
        called(model, inputs)
    return watching.used


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which parameters are used, and along which axis each gives channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes: dict[str, int] = {}
        self.used: set[str] = set()
        self._held = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self._is_held(leaf):
                self.used.add(self._held[leaf.untyped_storage().data_ptr()][0])
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            self._note(left, -2)
            # of two weights that are multiplied, the second reads what the product reads
            self._note(right, -2 if self._is_held(left) else -1)
        elif name == "convolution":
            self._note(args[1], int(args[6]))
        elif name in ("embedding", "embedding_bag", "_embedding_bag"):
            self._note(args[0], -1)
        elif name == "index":
            # a table whose positions are picked by number: the one axis that is left gives channels
            left = [i for i, size in enumerate(args[0].shape) if size > 1 and (*args[1], *[None] * 9)[i] is None]
            if len(left) == 1:
                self._note(args[0], left[0])
        return func(*args, **(kwargs or {}))

    def _is_held(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._held

    def _note(self, tensor: Tensor, axis: int) -> None:
        """The axis of the parameter that a view of it has there."""
        name, parameter = self._held.get(tensor.untyped_storage().data_ptr(), ("", tensor))
        if not name or tensor.dim() < 2 or name in self.axes:
            return
        steps = [i for i in range(parameter.dim()) if parameter.stride(i) == tensor.stride(axis)]
        steps = [i for i in steps if parameter.shape[i] >= tensor.shape[axis] and parameter.shape[i] > 1]
        if len(steps) == 1:
            self.axes[name] = steps[0]


def _usual_axis(model: nn.Module, name: str) -> int | None:
    """Where a weight that is changed before it is used gives channels; None of others, which are added."""
    name = name.partition(".parametrizations.")[0] + (".weight" if ".parametrizations." in name else "")
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)):
        return 0
    return 0 if "weight" in name.rpartition(".")[2] else None


def _read(model: nn.Module, outputs: Sequence[Tensor], used: set[str]) -> set[str]:
    """The parameters that the outputs depend on: those with a gradient, or those used where there are no gradients."""
    named = dict(model.named_parameters())
    made = [output.abs().sum() for output in outputs if output.requires_grad]
    if not made:
        return used
    try:
        gradients = torch.autograd.grad(sum(made[1:], made[0]), list(named.values()), allow_unused=True)
    except RuntimeError:  # something was changed in place
        return used
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _may_be_output(width: Width, shapes: Iterable[Sequence[int]]) -> bool:
    """Whether its channels may be positions of an output, by their number."""
    sizes = {size for shape in shapes for size in shape[1:] if size > 1}
    return any(width.size % size == 0 or size % width.size == 0 for size in sizes)


@torch.no_grad()
def _is_output(model: nn.Module, inputs: Inputs, width: Width) -> bool:
    """Whether its first and its last channel change different positions of an output."""
    before = numbers(model, inputs)
    parameter = model.get_parameter(width.tensor)
    changed = []
    for position in (0, width.size - 1):
        kept = parameter.detach().clone()
        parameter.select(width.axis, position).mul_(1.5).add_(0.1)
        _afresh(model)
        after = numbers(model, inputs)
        parameter.copy_(kept)
        changed.append([_places(a, b) for a, b in zip(before, after, strict=True)])
    for first, last in zip(*changed, strict=True):
        for one, other in zip(first, last, strict=True):
            if one and other and not one & other:
                return True
    return False


def _places(before: Tensor, after: Tensor) -> list[set[int]]:
    """Along each axis but the first, where two outputs differ."""
    if before.shape != after.shape:
        return []
    differ = ~torch.isclose(before, after, rtol=1e-5, atol=1e-7, equal_nan=True)
    found = []
    for axis in range(1, differ.dim()):
        found.append(set(differ.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()))
    return found
