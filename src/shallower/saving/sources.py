"""What a saved model is built from again: a library's class, by name and options."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlencode

from torch import Tensor, nn

from shallower.core.failures import failing
from shallower.errors import ModelError
from shallower.saving.hub import as_reachable
from shallower.saving.implementations import Implementations
from shallower.saving.vision import import_torchvision, repair_torchvision

Option = bool | int | float | str

LIBRARIES = ("timm", "torchvision", "transformers")
# Options under which a library would fetch or unpickle a file by itself.
_FILES = ("pretrained", "checkpoint", "weights", "cache")


def parse_options(text: str) -> tuple[str, dict[str, Option]]:
    """Split `name?option=value&option=value`; values are read as true, false, integers, numbers or else as text.

    Raises:
        ModelError: the options are malformed or one is given twice.
    """
    name, question, query = text.partition("?")
    if not question:
        return name, {}
    options: dict[str, Option] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=100)
    except ValueError as error:
        raise ModelError(f"{text}: the options are written as in name?option=value&option=value") from error
    for key, value in pairs:
        if not re.fullmatch(r"[A-Za-z]\w*", key, re.ASCII):
            raise ModelError(f"{text}: {key!r} is not the name of an option")
        if key in options:
            raise ModelError(f"{text}: the option {key} is given twice")
        options[key] = _value(value)
    return name, options


def format_options(name: str, options: Mapping[str, Option]) -> str:
    """The text that `parse_options` reads."""
    query = urlencode({key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()})
    if not query:
        return name
    return f"{name}?{query}"


def source_of(model: nn.Module) -> str:
    """The source of a Transformers model of the installed package; "" of any other model, which cannot tell."""
    # A model of the package has imported this module: without it there is nothing to ask.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return ""
    name = type(model).__name__
    if getattr(import_transformers(), name, None) is not type(model):
        return ""
    return "transformers:" + format_options(name, Implementations.of(model).options())


def _value(text: str) -> Option:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_known(name: str, known: list[str], options: Mapping[str, Option], library: str) -> None:
    if name not in known:
        problem = f"{library} has no model {name!r}"
        if close := difflib.get_close_matches(name, known, n=3):
            problem += f"; did you mean {', '.join(close)}?"
        raise ModelError(problem)
    for key in options:
        if key.startswith(_FILES):
            raise ModelError(f"{library}:{name}: the option {key} would read files; load the weights yourself")


# ---------------------------------------------------------------------------------------------------------- timm


def import_timm() -> ModuleType:
    """The timm package.

    Raises:
        ModelError: it is not installed.
    """
    repair_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            f"timm cannot be imported ({error}); install it with: pip install shallower[vision]"
        ) from error


def timm(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
    """A model of timm.

    Raises:
        ModelError: timm is not installed, has no such model, or cannot build it with these options.
    """
    timm = import_timm()
    _check_known(name.partition(".")[0], timm.list_models(), options, "timm")
    with _building(f"timm:{format_options(name, options)}", pretrained):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return model


@contextmanager
def _building(what: str, pretrained: bool) -> Iterator[None]:
    """Let what fails in building a model say which, and what to do without a network."""
    if not pretrained:
        with failing(ModelError, f"{what} cannot be built"):
            yield
        return
    advice = "Without network, ?pretrained=false gives random weights"
    with failing(ModelError, f"{what} cannot be built with its weights", advice), as_reachable():
        yield


# --------------------------------------------------------------------------------------------------- torchvision


def torchvision(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
    """A model of torchvision; pretrained weights but the classifier's where it has another number of classes.

    Raises:
        ModelError: torchvision is not installed, has no such model, or cannot build it with these options.
    """
    models = import_torchvision().models
    _check_known(name, models.list_models(module=models), options, "torchvision")
    with _building(f"torchvision:{format_options(name, options)}", pretrained):
        model: nn.Module = models.get_model(name, weights=None, **options)
        if pretrained:
            _load_fitting(model, models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True))
    return model


def _load_fitting(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all weights but the classifier's where it has another number of classes."""
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    missing = [key for key in own if key not in fitting]
    last = list(own)[-1].rpartition(".")[0]
    strange = [key for key in missing if key.rpartition(".")[0] != last and not key.endswith("num_batches_tracked")]
    if strange:
        raise ModelError(f"the pretrained weights do not fit at {strange[0]}")
    model.load_state_dict(fitting, strict=False)


# -------------------------------------------------------------------------------------------------- Transformers


def import_transformers() -> ModuleType:
    """The transformers package.

    Raises:
        ModelError: it is not installed.
    """
    repair_torchvision()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"transformers cannot be imported ({error}); install it with: pip install shallower[transformers]"
        ) from error


def model_class(library: ModuleType, name: str) -> Any | None:
    """The model class of that name in the transformers package, or None."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    found = getattr(library, name, None)
    if isinstance(found, type) and issubclass(found, library.PreTrainedModel):
        return found
    return None
