"""Where the tensors of a model live, and how they get there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shallower.core.trees import tensors as tensors_in
from shallower.errors import CheckpointError
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import weightless
from shallower.saving.description import DTYPES, Description, Layout

# torch.compile, activation checkpointing and FSDP put a module with one child around another.
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in a model.

    Attributes:
        module: that holds it.
        attribute: under this name.
        tensor: what stands there.
        kind: "transient" is a buffer that no state dict holds.
    """

    module: nn.Module
    attribute: str
    tensor: Tensor
    kind: Literal["parameter", "buffer", "transient"]


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer by its dotted name, also the further names of shared ones; wrappers do not count."""
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[plain_name(prefix, name)] = Slot(module, name, parameter, "parameter")
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            slot = Slot(module, name, buffer, "buffer")
            if name in module._non_persistent_buffers_set:
                slot = Slot(module, name, buffer, "transient")
            found[plain_name(prefix, name)] = slot
    return found


def plain_name(*parts: str) -> str:
    """A dotted name without the wrappers on the way.

    plain_name("layer._orig_mod.fc", "weight")      # "layer.fc.weight"
    """
    return _WRAPPER.sub("", ".".join(part for part in parts if part)).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and (Distributed)DataParallel."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with nothing attached and its parameters on the meta device."""
    return detached_copy(unwrapped(model), weightless(model.parameters()))


def _loose_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep in plain attributes, with their dotted names."""
    slots = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, nn.Module) or not isinstance(value, (Tensor, list, tuple, dict)):
                continue
            for tensor in tensors_in(value):
                if id(tensor) not in slots:
                    yield plain_name(prefix, attribute), tensor


# ------------------------------------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Stored:
    """The tensors of a model that are to be written.

    Attributes:
        entries: descriptions of `tensors`.
        tensors: parameters and persistent buffers, each once.
        buffers: the other buffers.
        tied: groups of names of one tensor; the first is in `tensors`.
        frozen: names of parameters without gradients.
    """

    entries: dict[str, Layout]
    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tied: list[list[str]]
    frozen: list[str]


def stored(model: nn.Module) -> Stored:
    """What is to be written of a model.

    Raises:
        CheckpointError: something that makes up the model would be lost, or cannot be written.
    """
    slots = slots_of(model)
    for name, slot in slots.items():
        _check_storable(name, slot.tensor)
    _check_complete(model)
    entries: dict[str, Layout] = {}
    tensors: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    groups: dict[Any, list[str]] = {}
    frozen = []
    for name, slot in slots.items():
        entries[name] = Layout.of(slot.tensor)
        if slot.kind == "transient":
            buffers[name] = slot.tensor
            continue
        group = groups.setdefault(_identity(slot.tensor), [])
        group.append(name)
        if len(group) == 1:
            tensors[name] = slot.tensor
            if slot.kind == "parameter" and slot.tensor.is_floating_point() and not slot.tensor.requires_grad:
                frozen.append(name)
    tied = [group for group in groups.values() if len(group) > 1]
    return Stored(entries, tensors, buffers, tied, frozen)


def _check_storable(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise CheckpointError(
            f"tensor {name}: its module is lazy and has not run yet; call the model once before saving"
        )
    if tensor.is_nested:
        raise CheckpointError(f"tensor {name}: a nested tensor cannot be saved; keep it as an ordinary, padded one")
    if type(tensor.detach()) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"tensor {name}: a {type(tensor).__name__} ({tensor.layout}) cannot be saved")
    if tensor.is_meta:
        raise CheckpointError(f"tensor {name}: it is on the meta device and has no values to save")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"tensor {name}: the dtype {tensor.dtype} cannot be saved")


def _check_complete(model: nn.Module) -> None:
    """Whether the parameters and buffers are all that the modules themselves would save."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{name}: a {type(module).__name__} keeps extra state that is not a tensor")
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, "", keep_vars=True)
        lost = [key for key in own if key not in module._parameters and key not in module._buffers]
        if lost:
            raise CheckpointError(
                f"{name or 'the model'}: a {type(module).__name__} keeps {lost[0]} outside of its parameters and "
                "buffers, and it would be lost. Save the model before it is quantised or packed"
            )


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are one and the same memory."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


# ---------------------------------------------------------------------------------------------------- what is read


def check_tensors_fit(skeleton: nn.Module, description: Description) -> None:
    """Every tensor has its place and every place its tensor, of that shape and kind of number.

    Raises:
        CheckpointError: they do not.
    """
    names = description.names
    slots = slots_of(skeleton)
    for name, slot in slots.items():
        described: Mapping[str, object] = names
        if slot.kind == "transient":
            described = description.buffers
        if name not in described:
            raise CheckpointError(f"tensor {name}: the model has it, and the files do not.")
    for name in (*names, *description.buffers):
        if name not in slots:
            raise CheckpointError(f"tensor {name:.200}: the files have it, and the model does not.")
    for name, first in names.items():
        entry, tensor = description.tensors[first], slots[name].tensor
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {name}: its shape is {list(entry.shape)} in the files and {list(tensor.shape)} in the model."
            )
        dtype = DTYPES[entry.dtype]
        if dtype.is_floating_point != tensor.is_floating_point() or dtype.is_complex != tensor.is_complex():
            raise CheckpointError(f"tensor {name}: it is {entry.dtype} in the files and {tensor.dtype} in the model.")


def check_whole(skeleton: nn.Module) -> None:
    """Every tensor in a plain attribute has numbers: no file has any for it.

    Raises:
        CheckpointError: one has none.
    """
    for name, tensor in _loose_tensors(skeleton):
        if tensor.is_meta:
            raise CheckpointError(f"{name}: a tensor that no state dict holds cannot be rebuilt.")


def put_in(
    skeleton: nn.Module, description: Description, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Give a skeleton its tensors."""
    slots = slots_of(skeleton)
    placed: dict[str, Tensor] = {}
    for name, first in description.names.items():
        slot = slots[name]
        if first not in placed:
            tensor = description.tensors[first].arranged(tensors[first])
            if slot.kind == "parameter":
                learns = tensor.is_floating_point() and first not in description.frozen
                tensor = nn.Parameter(tensor, requires_grad=learns)
            placed[first] = tensor
        setattr(slot.module, slot.attribute, placed[first])
    for name, entry in description.buffers.items():
        setattr(slots[name].module, slots[name].attribute, entry.arranged(buffers[name]))
