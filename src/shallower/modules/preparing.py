"""What layers need before channels are cut out of their tensors.

for edit in ready_for_cuts(model, ["encoder.self_attn.in_proj_weight"]):
    perform(model, edit)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shallower.modules.edits import Dense, StructuralEdit
from shallower.modules.prepared.attention import is_stock


def ready_for_cuts(model: nn.Module, tensors: Iterable[str]) -> list[StructuralEdit]:
    """The edits of layers that cannot lose channels as they are, before some of their tensors do.

    Args:
        model: not changed.
        tensors: dotted names.
    """
    found: dict[str, StructuralEdit] = {}
    for tensor in tensors:
        name = tensor.rpartition(".")[0]
        for place in (name, name.rpartition(".")[0]):
            if is_stock(model.get_submodule(place)):
                found[place] = Dense(place)
    return list(found.values())
