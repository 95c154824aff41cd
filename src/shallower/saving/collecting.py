"""The edits that a file holds: what surgery did to a model and its parts, brought up to date."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.modules.edits import Norm, Resize, StructuralEdit, edits, encoded, place_of
from shallower.modules.layers import geometry_of, kind_of, weight_of
from shallower.modules.records import exchanged
from shallower.saving.slots import plain_name


def collected(model: nn.Module) -> list[dict[str, Any]]:
    """The edits of a model as plain data, in order.

    A layer that surgery made and somebody exchanged since for one of the same kind, for another number of classes for
    instance, has the sizes that it has now. What surgery made and is gone has no edit.
    """
    found = []
    for edit in edits(model):
        name = place_of(edit)
        data = encoded(edit)
        present = _present(plain_name(name), model.get_submodule(name))
        if present is not None and _is_like(present, edit):
            data = encoded(present)
        for key in data.keys() & {"name", "module"}:
            data[key] = plain_name(data[key])
        found.append(data)
    for name, module in exchanged(model):
        present = _present(plain_name(name), module)
        if present is not None:
            found.append(encoded(present))
    return found


def _is_like(present: Resize | Norm, edit: StructuralEdit) -> bool:
    """Whether what stands there is of the kind that the edit made."""
    return type(present) is type(edit) and getattr(present, "kind", "") == getattr(edit, "kind", "")


def _present(name: str, module: nn.Module) -> Resize | Norm | None:
    """The edit that gives a linear map or a BatchNorm the sizes it has; None for any other module."""
    if isinstance(module, _BatchNorm):
        return Norm(name, module.num_features)
    kind = kind_of(module)
    if not kind:
        return None
    weight = weight_of(module)
    geometry: dict[str, Any] = dict.fromkeys(("kernel", "stride", "dilation"), (1, 1))
    geometry |= {"padding": (0, 0), "groups": 1}
    if isinstance(module, nn.Conv2d):
        geometry = {**geometry_of(module), "kernel": tuple(weight.shape[2:])}
    data = {"d_in": weight.shape[1] * geometry["groups"], "d_out": weight.shape[0], **geometry}
    return Resize(name=name, kind=cast("Any", kind), bias=module.bias is not None, **data)
