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

from shallower.errors import ModelError
from shallower.saving.vision import import_torchvision, repair_torchvision

Option = bool | int | float | str

_LIBRARIES = ("timm", "torchvision", "transformers")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Options under which a library would fetch or unpickle a file by itself.
_FILES = ("pretrained", "checkpoint", "weights", "cache")


def parse_options(text: str) -> tuple[str, dict[str, Option]]:
    """Split `name?option=value&option=value`; values are read as true, false, integers, numbers or else as text.

    Raises:
        ModelError: the options are malformed or one is given twice.
    """
    name, question, query = text.partition("?")
    options: dict[str, Option] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=100) if question else []
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
    return f"{name}?{query}" if query else name


def source_of(model: nn.Module) -> str:
    """The source of a Transformers model of the installed package; "" of any other model, which cannot tell."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return ""
    name = type(model).__name__
    if getattr(library, name, None) is not type(model):
        return ""
    attention = getattr(model.config, "_attn_implementation", None)
    return "transformers:" + format_options(name, {"attention": attention} if attention in _ATTENTION else {})


def build_skeleton(
    source: str, config: Mapping[str, Any] | None = None, *, most_parameters: int | None = None
) -> nn.Module:
    """The architecture that a source names, with its parameters on the meta device; buffers are real.

    Only classes and functions of Transformers, timm and torchvision are called; nothing is fetched, and no file is
    read.

    Args:
        source: "transformers:CLASS", "timm:NAME" or "torchvision:NAME", with options.
        config: of a Transformers model, as its config.json has it.
        most_parameters: give up where the architecture has more parameter tensors: a file could ask for a billion
            layers.

    Raises:
        ModelError: the source does not name such an architecture, or the library cannot build it.
    """
    library, _, rest = source.partition(":")
    if library not in _LIBRARIES or not rest:
        raise ModelError(f"{source!r} names no architecture of Transformers, timm or torchvision")
    name, options = parse_options(rest)
    if library == "transformers":
        return _transformers_skeleton(name, options, config or {}, most_parameters)
    with _parameters_on_meta(most_parameters):
        return timm(name, options, False) if library == "timm" else torchvision(name, options, False)


@contextmanager
def _parameters_on_meta(most: int | None) -> Iterator[None]:
    """Modules that are made meanwhile get their parameters on the meta device.

    Buffers stay real, because many are computed when a module is made and stand in no state dict.
    """
    register = nn.Module.register_parameter
    made = 0

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal made
        register(self, name, param)
        if param is not None and not param.is_meta:
            made += 1
            if most is not None and made > most:
                raise ModelError(f"the architecture has more than {most} parameters, and the files far fewer")
            empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            vars(empty).update(vars(param))
            self._parameters[name] = empty

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


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


def _checked(name: str, known: list[str], options: Mapping[str, Option], library: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise ModelError(f"{library} has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    for key in options:
        if key.startswith(_FILES):
            raise ModelError(f"{library}:{name}: the option {key} would read files; load the weights yourself")


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------- timm


def _import_timm() -> ModuleType:
    repair_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            f"timm cannot be imported ({error}); install it with: pip install shallower[vision]"
        ) from error


def timm(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
    timm = _import_timm()
    _checked(name.partition(".")[0], timm.list_models(), options, "timm")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        raise _not_built(f"timm:{format_options(name, options)}", error, pretrained) from error
    return model


def _not_built(what: str, error: Exception, pretrained: bool) -> ModelError:
    hint = "; without network, ?pretrained=false gives random weights" if pretrained else ""
    return ModelError(f"{what} cannot be built: {first_line(error)}{hint}")


# --------------------------------------------------------------------------------------------------- torchvision


def torchvision(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
    models = import_torchvision().models
    _checked(name, models.list_models(module=models), options, "torchvision")
    try:
        model: nn.Module = models.get_model(name, weights=None, **options)
        if pretrained:
            _load_fitting(model, models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True))
    except Exception as error:
        raise _not_built(f"torchvision:{format_options(name, options)}", error, pretrained) from error
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
    repair_torchvision()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"transformers cannot be imported ({error}); install it with: pip install shallower[transformers]"
        ) from error


def model_class(library: ModuleType, name: str) -> Any | None:
    found = getattr(library, name, None) if name.isidentifier() and not name.startswith("_") else None
    return found if isinstance(found, type) and issubclass(found, library.PreTrainedModel) else None


def _transformers_skeleton(
    name: str, options: dict[str, Option], config: Mapping[str, Any], most_parameters: int | None
) -> nn.Module:
    library = import_transformers()
    architecture = model_class(library, name)
    if architecture is None or architecture.config_class is None:
        raise ModelError(f"transformers has no model class {name!r}")
    attention = options.pop("attention", None)
    if options or (attention is not None and attention not in _ATTENTION):
        raise ModelError(f"transformers:{name}: unknown options; only attention= is known, one of {_ATTENTION}")
    try:
        settings = architecture.config_class.from_dict(_inert(config))
        if attention is not None:
            settings._attn_implementation = attention
        with _parameters_on_meta(most_parameters):
            model: nn.Module = architecture(settings)
    except Exception as error:
        raise ModelError(f"transformers:{name} cannot be built from its config: {first_line(error)}") from error
    return model


def _inert(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what would make Transformers fetch weights or code."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: False if key == "use_pretrained_backbone" else cleaned(item)
                for key, item in value.items()
                if not str(key).endswith(("attn_implementation", "experts_implementation")) and key != "auto_map"
            }
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = cleaned(config)
    return result
