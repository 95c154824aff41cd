"""What surgery did to a Transformers model, in its config, so that `from_pretrained` can do it again.

    record(small)                           # small.config.quantization_config = {"quant_method": "shallower", ...}
    rebuilt(fresh, small.config.quantization_config)

Through `quantization_config`, Transformers lets a library change a fresh model before the weights come. What stands
there goes wherever a config goes: into the directories of `save_pretrained`, of trainers and of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shallower.errors import CheckpointError
from shallower.modules.edits import Externalise, Sized, StructuralEdit, decoded, edits, place_of, replay
from shallower.saving.collecting import collected

KEY = "quantization_config"
METHOD = "shallower"
VERSION = 1


def surgery_record(model: nn.Module) -> dict[str, Any]:
    """What the config of a model holds of its surgery."""
    lacking = ""
    for edit in edits(model):
        if isinstance(edit, Sized) and edit.attribute in model.get_submodule(edit.name)._non_persistent_buffers_set:
            lacking = f"{edit.name}.{edit.attribute}"
    return {"quant_method": METHOD, "version": VERSION, "lacking": lacking, "edits": collected(model)}


def is_record(value: object) -> bool:
    """Whether a value in a config is what `surgery_record` made."""
    return isinstance(value, Mapping) and value.get("quant_method") == METHOD


def record(model: nn.Module, needed: bool = True) -> None:
    """Let the config of a stock model hold what surgery did to it, or nothing where its class needs no such thing.

    A config that says how the model was quantized by another library stays as it is.
    """
    config = vars(model)["config"]
    if not is_record(vars(config).get(KEY, {"quant_method": METHOD})):
        return
    if needed and edits(model):
        setattr(config, KEY, surgery_record(model))
    else:
        vars(config).pop(KEY, None)


def without_record(config: dict[str, Any]) -> dict[str, Any]:
    """A config as plain data, without the record."""
    if is_record(config.get(KEY)):
        del config[KEY]
    return config


def rebuilt(model: nn.Module, recorded: Mapping[str, Any]) -> None:
    """Do to a fresh model what a record says, in place and without weights.

    The model may be the one around the recorded one, or that inside it: a classifier, or its encoder.

    Raises:
        CheckpointError: the record is malformed, or of another model.
    """
    if recorded.get("version") != VERSION or not isinstance(recorded.get("edits"), list):
        raise CheckpointError("the record of surgery in the config is of an unknown version; install a newer Shallower")
    if recorded.get("lacking"):
        raise CheckpointError(
            f"`{recorded['lacking']}` is a buffer that Transformers does not save, and surgery has changed it. Read "
            "the directory that shallower.save wrote with shallower.load"
        )
    made = [decoded(i, data) for i, data in enumerate(recorded["edits"])]
    with torch.device("meta"):
        for edit in _named_for(model, made):
            replay(model, [edit])


def _named_for(model: nn.Module, made: Sequence[StructuralEdit]) -> Iterator[StructuralEdit]:
    """The edits, by the names that their modules have in a model with or without a head."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = bool(prefix) and not hasattr(model, prefix)
    around = bool(prefix) and not any(f"{place_of(edit)}.".startswith(f"{prefix}.") for edit in made)
    for edit in made:
        name = place_of(edit)
        if inside and name != prefix and not name.startswith(f"{prefix}."):
            if any(f"{place_of(other)}.".startswith(f"{prefix}.") for other in made):
                continue  # of a head that this model has not
        elif inside:
            name = name.removeprefix(prefix).removeprefix(".")
        elif around:
            name = f"{prefix}.{name}".rstrip(".")
        if isinstance(edit, Externalise):
            yield replace(edit, module=name)
        else:
            yield replace(edit, name=name)
