"""Every type of model of Transformers whose configuration can be made tiny."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.families import Family, Made
from benchmarks.families.axes import called, floats, used
from benchmarks.families.mixed import MEDIA, mixed_inputs
from benchmarks.families.optional import optional_inputs
from benchmarks.families.plain import plain_inputs
from benchmarks.families.tiny import VARIANTS, tiny_config

TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "MASKED_LM",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "CTC",
    "IMAGE_TEXT_TO_TEXT",
    "DEPTH_ESTIMATION",
    "TIME_SERIES_PREDICTION",
)
"""Of a type with several models, the first of these is taken, or else the one without a head."""

RARE = (
    "IMAGE_MATTING",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "POSE_ESTIMATION",
    "RETRIEVAL",
    "UNIVERSAL_SEGMENTATION",
    "TABLE_RECOGNITION",
    "BACKBONE",
)
"""Where there is none of either, the first of these."""

MOST_PARAMS = 8_000_000


def listed() -> list[Family]:
    """One family for each type."""
    types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    return [Family(f"hf_{name}", "transformers", partial(made, name)) for name in types]


def made(name: str) -> Made:
    """The model of a type, and inputs that it runs on.

    Raises:
        ValueError: it cannot be made tiny, or runs on no inputs that are known here.
    """
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    failures = []
    for sizes in VARIANTS:
        torch.manual_seed(0)
        try:
            config = tiny_config(auto.CONFIG_MAPPING[name], sizes)
            return _run(_model(name, config).eval(), config)
        except Exception as error:  # sizes that do not fit together raise whatever the model does
            failures.append(f"{type(error).__name__}: {error}"[:200])
    raise ValueError("; ".join(dict.fromkeys(failures)))


def _run(model: nn.Module, config: Any) -> Made:
    """The model and the first inputs that it runs on, with whatever else makes it read more of its weights."""
    failures = []
    taken = inspect.signature(model.forward).parameters
    for inputs in plain_inputs(model, config):
        if not inputs.keys() <= taken.keys():  # a forward may take whatever it is given, and read none of it
            continue
        try:
            with torch.no_grad():
                outputs = called(model, inputs)
        except Exception as error:  # of other inputs than it takes
            failures.append(f"{sorted(inputs)}: {type(error).__name__}: {error}"[:200])
            continue
        if floats(outputs):
            return model, _richer(model, config, inputs)
    raise ValueError("; ".join(failures))


def _richer(model: nn.Module, config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with whatever else the model takes that makes it read more of its weights."""
    for kind in MEDIA:
        inputs = _better(model, inputs, partial(mixed_inputs, model, config, inputs, kind)) or inputs
    while True:
        better = _better(model, inputs, partial(optional_inputs, config, inputs))
        if better is None:
            return inputs
        inputs = better


def _better(
    model: nn.Module, inputs: dict[str, Any], others: Callable[[], Iterator[dict[str, Any]]]
) -> dict[str, Any] | None:
    """The first of other inputs with which the model reads more of its weights; None where it does with none."""
    taken = inspect.signature(model.forward).parameters
    read = used(model, inputs)
    if read >= {name for name, _ in model.named_parameters()}:
        return None
    for other in others():
        if not other.keys() <= taken.keys():
            continue
        try:
            now = used(model, other)
        except Exception:  # of other inputs than it takes
            continue
        if len(now) > len(read):
            return other
    return None


def _model(name: str, config: Any) -> nn.Module:
    """The first task's model, without weights where it is too large."""
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    transformers = importlib.import_module("transformers")
    mappings = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS]
    rare = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in RARE]
    errors = []
    for mapping in [*mappings, "MODEL_MAPPING_NAMES", *rare]:
        names = getattr(modeling, mapping).get(name)
        if names is None:
            continue
        if isinstance(names, tuple):
            names = names[0]
        kind = getattr(transformers, names)
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in kind(config).parameters())
        except Exception:  # not every model can be made without data
            count = 0
        if count > MOST_PARAMS:
            raise ValueError(f"{names} has {count} parameters")
        try:
            model: nn.Module = kind(config)
            return model
        except Exception as error:  # the next may do
            errors.append(f"{names}: {type(error).__name__}: {error}"[:200])
    raise ValueError("; ".join(errors) or "there is no model")
