"""Where the tensors of a model live, and how they get there."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from shallower.errors import CheckpointError
from shallower.modules.attachment import detach
from shallower.modules.edits import edits
from shallower.saving.description import DTYPES, Description, Entry

# -------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class _Slot:
    """Where a tensor stands in a model."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    kind: Literal["parameter", "buffer", "transient"]


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every parameter and buffer by its dotted name, also the further names of shared ones."""
    found: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[dot + name] = _Slot(module, name, parameter, "parameter")
        for name, buffer in module._buffers.items():
            if buffer is not None:
                transient = name in module._non_persistent_buffers_set
                found[dot + name] = _Slot(module, name, buffer, "transient" if transient else "buffer")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return cast("nn.Module", getattr(model, "_orig_mod", model))


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with nothing attached and its parameters on the meta device."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    duplicate = copy.deepcopy(unwrapped(model), cast("dict[int, Any]", empty))
    detach(duplicate)
    return duplicate


def describe(
    model: nn.Module, source: str, training: Mapping[str, Any] | None
) -> tuple[Description, dict[str, Tensor], dict[str, Tensor]]:
    """The description of a model, its tensors and its non-persistent buffers, ready to be written."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{name}: a {type(module).__name__} keeps extra state that is not a tensor")
    tensors: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    groups: dict[Any, list[str]] = {}
    frozen = []
    for name, slot in _slots(model).items():
        tensor = slot.tensor
        if type(tensor.detach()) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"tensor {name}: a {type(tensor).__name__} ({tensor.layout}) cannot be saved")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name}: it is on the meta device and has no values to save")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise CheckpointError(f"tensor {name}: the dtype {tensor.dtype} cannot be saved")
        entries[name] = Entry.of(tensor)
        if slot.kind == "transient":
            buffers[name] = _alone(tensor)
            continue
        group = groups.setdefault(_identity(tensor), [])
        group.append(name)
        if len(group) == 1:
            tensors[name] = _alone(tensor)
            if slot.kind == "parameter" and tensor.is_floating_point() and not tensor.requires_grad:
                frozen.append(name)
    description = Description(
        source=source,
        edits=edits(model),
        tensors={name: entries[name] for name in tensors},
        buffers={name: entries[name] for name in buffers},
        tied=[group for group in groups.values() if len(group) > 1],
        frozen=frozen,
        training=dict(training or {}),
    )
    try:
        again = json.loads(json.dumps(description.to_json(), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the training record is not plain JSON data: {error}") from error
    return Description.from_json(again), tensors, buffers


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are one and the same memory."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _alone(tensor: Tensor) -> Tensor:
    """The values on the CPU, contiguous, in a storage that holds nothing else."""
    values = tensor.detach().cpu().contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def check_fits(skeleton: nn.Module, description: Description) -> None:
    """Every tensor has its place and every place its tensor, of that shape and kind of number."""
    names = description.names
    slots = _slots(skeleton)
    for name, slot in slots.items():
        if name not in (description.buffers if slot.kind == "transient" else names):
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
    for prefix, module in skeleton.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(f"{prefix}.{attribute}: a tensor that no state dict holds cannot be rebuilt.")


def put_in(
    skeleton: nn.Module, description: Description, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    slots = _slots(skeleton)
    placed: dict[str, Tensor] = {}
    for name, first in description.names.items():
        slot = slots[name]
        if first not in placed:
            tensor = description.tensors[first].arranged(tensors[first])
            learns = tensor.is_floating_point() and first not in description.frozen
            placed[first] = nn.Parameter(tensor, requires_grad=learns) if slot.kind == "parameter" else tensor
        setattr(slot.module, slot.attribute, placed[first])
    for name, entry in description.buffers.items():
        setattr(slots[name].module, slots[name].attribute, entry.arranged(buffers[name]))
