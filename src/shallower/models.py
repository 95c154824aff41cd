"""Models by name: what a MODEL on the command line may be, and how a saved model's architecture is built again.

    loaded = load_model("timm:vit_tiny_patch16_224?num_classes=10", pretrained=False)
    loaded.model, loaded.source, loaded.make_example_inputs(batch=2)

A *spec* is what a person writes. A *source* is what a saved file says; it names library code only, so that reading
a file runs nobody's code.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch
from torch import Tensor, nn

from shallower.errors import ModelError, ShallowerError
from shallower.inputs import Inputs
from shallower.tasks import TaskName
from shallower.vision import import_torchvision, repair_torchvision

Option = bool | int | float | str

DESCRIPTION = "shallower.json"
"""The file that tells a directory written by `save`."""

_LIBRARIES = ("timm", "torchvision", "transformers")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\?.*)?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Options under which a library would fetch or unpickle a file by itself.
_FILES = ("pretrained", "checkpoint", "weights", "cache")
_AUTO_CLASSES: Mapping[TaskName, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "image-feature-extraction": "AutoModel",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what its description says about it.

    Attributes:
        model: in eval mode.
        source: how `save` may say what it is; "" where nothing can rebuild it (a factory).
        processor: its tokenizer or image processor, from Transformers; None where there is none.
        example: inputs that a factory gave along with the model.
    """

    model: nn.Module
    source: str
    processor: Any | None = None
    example: Inputs | None = None

    def make_example_inputs(self, *, batch: int = 1, length: int = 32, seed: int = 0) -> Inputs:
        """Random inputs that fit the model.

        Token ids come from the vocabulary without its special tokens, with an attention mask of ones; images have the
        size that the model is configured for. What a factory gave is returned as it is.

        Args:
            batch: first dimension.
            length: tokens in a row, at most what the model has positions for.
            seed: of the random values.

        Raises:
            ModelError: the model does not say what it takes.
        """
        if self.example is not None:
            return self.example
        generator = torch.Generator().manual_seed(seed)
        library, _, rest = self.source.partition(":")
        if library in ("timm", "torchvision"):
            size = _timm_size(self.model, rest) if library == "timm" else _torchvision_size(rest)
            return torch.randn(batch, *size, generator=generator)
        if library == "transformers":
            return _transformers_inputs(self.model, batch, length, generator)
        raise ModelError(
            "nothing says what this model takes: let the factory return (model, example_inputs), or give the inputs"
        )


def load_model(
    spec: str, *, task: TaskName | None = None, num_labels: int | None = None, pretrained: bool = True
) -> LoadedModel:
    """The model that `spec` describes, in eval mode.

        load_model("out/")                                       # written by sh.save
        load_model("bert-base-uncased", task="text-classification", num_labels=2)
        load_model("torchvision:vgg16_bn?num_classes=10", pretrained=False)
        load_model("my.models:make_net?width=64")                # called; returns a model or (model, example_inputs)

    Args:
        spec: a directory written by `save`, a Transformers directory or hub name, `timm:NAME`, `torchvision:NAME` or
            `package.module:factory`; the last three with options, as in `NAME?option=value&option=value`. The
            factory's module is imported, also from the current directory.
        task: which head a Transformers model gets; by default the one it was saved with.
        num_labels: classes of that head, or of the classifier in timm and torchvision.
        pretrained: False for random weights. As an option of the spec, `?pretrained=false` says the same.

    Raises:
        ModelError: there is no such model, its library is not installed, or an option does not fit.
        CheckpointError: a directory written by `save` cannot be trusted.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / DESCRIPTION).exists():
            return _saved(path)
        if not (path / "config.json").exists():
            raise ModelError(f"{spec}: neither a Transformers directory (config.json) nor one that save wrote")
        return _transformers(str(path), task, num_labels, pretrained)
    library, _, rest = spec.partition(":")
    if rest and library in ("timm", "torchvision"):
        name, options = parse_options(rest)
        pretrained = bool(options.pop("pretrained", pretrained))
        if num_labels is not None:
            options.setdefault("num_classes", num_labels)
        model = _timm(name, options, pretrained) if library == "timm" else _torchvision(name, options, pretrained)
        return LoadedModel(model.eval(), f"{library}:{format_options(name, options)}")
    if _FACTORY.fullmatch(spec):
        return _factory(spec)
    if _HUB_NAME.fullmatch(spec):
        return _transformers(spec, task, num_labels, pretrained)
    raise ModelError(
        f"{spec}: no such directory, and not a model name either: give a Transformers directory or hub name, "
        "timm:NAME, torchvision:NAME or package.module:factory"
    )


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
        return _timm(name, options, False) if library == "timm" else _torchvision(name, options, False)


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


def _first_line(error: BaseException) -> str:
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


def _timm(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
    timm = _import_timm()
    _checked(name.partition(".")[0], timm.list_models(), options, "timm")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        raise _not_built(f"timm:{format_options(name, options)}", error, pretrained) from error
    return model


def _timm_size(model: nn.Module, description: str) -> tuple[int, ...]:
    resolve = importlib.import_module("timm.data").resolve_data_config
    sizes = {key: value for key, value in parse_options(description)[1].items() if key in ("in_chans", "img_size")}
    given: tuple[int, ...] = resolve(sizes, model=model)["input_size"]
    return (int(sizes.get("in_chans", given[0])), *given[1:])


def _not_built(what: str, error: Exception, pretrained: bool) -> ModelError:
    hint = "; without network, ?pretrained=false gives random weights" if pretrained else ""
    return ModelError(f"{what} cannot be built: {_first_line(error)}{hint}")


# --------------------------------------------------------------------------------------------------- torchvision


def _torchvision(name: str, options: Mapping[str, Option], pretrained: bool) -> nn.Module:
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


def _torchvision_size(description: str) -> tuple[int, int, int]:
    name, options = parse_options(description)
    preset = import_torchvision().models.get_model_weights(name).DEFAULT.transforms
    size = options.get("image_size", preset.keywords["crop_size"])
    return 3, int(size), int(size)


# ------------------------------------------------------------------------------------------------------- factory


def _factory(spec: str) -> LoadedModel:
    path, options = parse_options(spec)
    package, _, name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(package), name)
        made = factory(**options)
    except ShallowerError:
        raise
    except Exception as error:
        raise ModelError(f"{spec}: {_first_line(error)}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}: returned a {type(model).__name__}, not a torch.nn.Module")
    return LoadedModel(model.eval(), source_of(model), None, example)


# -------------------------------------------------------------------------------------------------- Transformers


def _import_transformers() -> ModuleType:
    repair_torchvision()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"transformers cannot be imported ({error}); install it with: pip install shallower[transformers]"
        ) from error


def _transformers(spec: str, task: TaskName | None, num_labels: int | None, pretrained: bool) -> LoadedModel:
    library = _import_transformers()
    local = Path(spec).is_dir()
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model: Any
    try:
        config = library.AutoConfig.from_pretrained(spec, **where, **labels)
        architecture = _architecture(library, task, config)
        if not pretrained:
            of_config = getattr(architecture, "from_config", None) or architecture._from_config
            model = of_config(config)
        else:
            model = architecture.from_pretrained(
                spec, config=config, ignore_mismatched_sizes=num_labels is not None, **where
            )
    except Exception as error:
        known = "" if local else "; there is no such directory, and the hub does not have it or cannot be reached"
        raise ModelError(f"{spec}: {_first_line(error)}{known}") from error
    processor = _processor(library, spec, model, where)
    if task == "text-classification" and processor is not None:
        # GPT-like models have no padding token, and cannot tell a row's last token without one.
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return LoadedModel(model.eval(), source_of(model), processor)


def _architecture(library: ModuleType, task: TaskName | None, config: Any) -> Any:
    if task is not None:
        return getattr(library, _AUTO_CLASSES[task])
    for name in config.architectures or ():
        architecture = _model_class(library, name)
        if architecture is not None:
            return architecture
    return library.AutoModel


def _model_class(library: ModuleType, name: str) -> Any | None:
    found = getattr(library, name, None) if name.isidentifier() and not name.startswith("_") else None
    return found if isinstance(found, type) and issubclass(found, library.PreTrainedModel) else None


def _processor(library: ModuleType, spec: str, model: Any, where: Mapping[str, Any]) -> Any | None:
    """The tokenizer or image processor that lies beside the weights, or None."""
    images = model.main_input_name == "pixel_values"
    auto = library.AutoImageProcessor if images else library.AutoTokenizer
    if Path(spec).is_dir():
        beside = ("preprocessor_config.json", "processor_config.json") if images else ("tokenizer_config.json",)
        if not any((Path(spec) / name).exists() for name in (*beside, *(() if images else ("tokenizer.json",)))):
            return None
    try:
        return auto.from_pretrained(spec, **where)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _saved(path: Path) -> LoadedModel:
    from shallower.checkpoint import load, read_source

    model = load(path)
    source = read_source(path)
    if not source.startswith("transformers:"):
        return LoadedModel(model, source)
    where = {"trust_remote_code": False, "local_files_only": True}
    return LoadedModel(model, source, _processor(_import_transformers(), str(path), model, where))


def _transformers_skeleton(
    name: str, options: dict[str, Option], config: Mapping[str, Any], most_parameters: int | None
) -> nn.Module:
    library = _import_transformers()
    architecture = _model_class(library, name)
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
        raise ModelError(f"transformers:{name} cannot be built from its config: {_first_line(error)}") from error
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


def _transformers_inputs(model: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes and (main == "input_ids" or hasattr(config, "text_config")):
        ids = _token_ids(config, batch, length, generator)
        inputs["input_ids"] = ids
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones_like(ids)
    if main == "pixel_values" or ("pixel_values" in takes and not model.can_generate()):
        inputs["pixel_values"] = torch.randn(
            batch, *_image_size(getattr(config, "vision_config", config)), generator=generator
        )
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
    if main == "input_values":
        mels = getattr(config, "num_mel_bins", None)
        shape = (config.max_length, mels) if mels else (16000,)
        inputs["input_values"] = torch.randn(batch, *shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _token_ids(config, batch, length, generator)
    if main not in inputs:
        raise ModelError(f"{type(model).__name__} takes {main}, for which no example is known: give the inputs")
    return inputs


def _token_ids(config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    # RoBERTa's positions start after its padding index.
    length = min(length, positions - 2) if isinstance(positions, int) and positions > 2 else length
    special: set[int] = set()
    for owner in (config, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"):
            value = getattr(owner, name, None)
            special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (batch, length), generator=generator)]
    if getattr(config, "is_encoder_decoder", False) and isinstance(text.eos_token_id, int):
        # Classifiers of this kind read the position of the end token.
        ids[:, -1] = text.eos_token_id
    return ids


def _image_size(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)
