"""Models whose weights are on disk: as plain models whose weights are mapped from their files.

    model = AutoModelForCausalLM.from_pretrained(directory, device_map={"": "disk"}, offload_folder="offload")
    plain = with_mapped_weights(model)

Accelerate leaves the parameters of an offloaded model on the meta device, with hooks that load one layer at a time
while the model runs. Here each parameter becomes a view of its file instead, so that whatever reads weights works as
ever, and no more of them has to be in memory than is being read: the system reads pages as they are needed, and drops
them where it needs the room. Copies share these views, and layers that surgery writes into get memory of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shallower.core.tensors import nbytes_of
from shallower.errors import ModelError

M = TypeVar("M", bound=nn.Module)

_MARK = "_shallower_mapped"

_WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "hf_device_map")
"""What Accelerate puts on a model beside its hooks."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether Accelerate keeps weights of this model elsewhere and loads them while it runs."""
    return isinstance(model, nn.Module) and any(True for module in model.modules() for _ in _weights_of(module))


def with_mapped_weights(model: M) -> M:
    """An offloaded model as a plain one on the CPU, whose weights are mapped from their files; any other model itself.

    The argument is untouched. Weights that Accelerate holds in memory are shared with it.

    Raises:
        ModelError: a weight is neither there nor in a file; the error names it.
    """
    if not is_offloaded(model):
        return model
    memo: dict[int, Any] = {}
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        memo[id(hook)] = hook
        found = {name: weights for weights in _weights_of(module) for name in weights}
        tables: tuple[Mapping[str, Tensor | None], ...] = (module._parameters, module._buffers)
        for name, tensor in ((name, t) for table in tables for name, t in table.items() if t is not None):
            if not tensor.is_meta:
                if isinstance(tensor, nn.Parameter):
                    memo[id(tensor)] = _shared(tensor, tensor.detach().cpu())
            elif name in found:
                value = _in_file(found[name], name)
                memo[id(tensor)] = _shared(tensor, value) if isinstance(tensor, nn.Parameter) else value
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        state = vars(module)
        state.pop("_hf_hook", None)
        if "_old_forward" in state:
            forward = state.pop("_old_forward")
            state.pop("forward", None)
            if getattr(forward, "__func__", None) is not type(module).forward:
                state["forward"] = forward
    for name in _WRAPPED:
        vars(plain).pop(name, None)
    if callable(tie := getattr(plain, "tie_weights", None)):
        tie()
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"{name}: this weight of the offloaded model is in no file and not in memory; load it again"
            )
    return plain


def shared_weights(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with which copies share the weights that are mapped from files."""
    return lent(filter(is_mapped, model.parameters()))


def lent(parameters: Iterable[nn.Parameter]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with which copies, and copies of these, share the given parameters.

    part = copy.deepcopy(model, lent(model.embeddings.parameters()))
    """
    return {id(p): _shared(p, p.detach()) for p in parameters}


def weightless(weights: Iterable[Tensor]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with which copies have the given parameters and buffers on the meta device.

    skeleton = copy.deepcopy(model, weightless(model.parameters()))
    """
    memo: dict[int, Any] = {}
    for t in weights:
        empty = torch.empty_like(t, device="meta")
        if isinstance(t, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=t.requires_grad)
        memo[id(t)] = empty
    return memo


def is_mapped(parameter: Tensor) -> bool:
    """Whether this parameter is a view of a file, or shared with an offloaded model: not to be written into."""
    return bool(getattr(parameter, _MARK, False))


def own_weights(module: nn.Module) -> None:
    """Give the parameters of one layer memory of their own, where they are mapped."""
    for name, p in module.named_parameters(recurse=False):
        if is_mapped(p):
            module.register_parameter(name, nn.Parameter(p.detach().clone(), p.requires_grad))


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are in memory for good."""
    return nbytes_of(filterfalse(is_mapped, model.parameters()))


def _shared(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    found = nn.Parameter(value, parameter.requires_grad)
    setattr(found, _MARK, True)
    return found


def _weights_of(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Where hooks of this module find its weights, by their names in it."""
    hook = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if getattr(each, "offload", False) and weights is not None:
            yield _Named(weights, [*module._parameters, *module._buffers])


class _Named(Mapping[str, Tensor]):
    """The part of a mapping that has these names."""

    def __init__(self, weights: Mapping[str, Tensor], names: list[str]) -> None:
        self.weights = weights
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _in_file(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight as Accelerate keeps it: from memory, from a safetensors file, or from a file of its own."""
    place: Any = weights.weights if isinstance(weights, _Named) else weights
    while hasattr(place, "dataset") and hasattr(place, "prefix"):
        place, name = place.dataset, f"{place.prefix}{name}"
    entry = getattr(place, "index", {}).get(name)
    in_memory = getattr(place, "state_dict", {})
    if entry is None or name in in_memory or entry.get("safetensors_file") is not None:
        found: Tensor = place[name]  # safetensors maps its files
        return found
    dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
    path = Path(place.save_folder) / f"{name}.dat"
    raw = torch.from_file(str(path), shared=False, size=math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def device_around(model: nn.Module, name: str) -> torch.device:
    """Where the parameters around a module are; the CPU where there are none."""
    while name:
        name = name.rpartition(".")[0]
        parameter = next(model.get_submodule(name).parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")
