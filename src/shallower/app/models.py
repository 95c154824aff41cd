"""Models by name: what a MODEL on the command line may be, and how a saved model's architecture is built again.

    loaded = load_model("timm:vit_tiny_patch16_224?num_classes=10", pretrained=False)
    loaded.model, loaded.source, loaded.make_example_inputs(batch=2)

A *spec* is what a person writes. A *source* is what a saved file says; it names library code only, so that reading
a file runs nobody's code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shallower.app.failures import foreign_code
from shallower.app.options import HUB_NAME, TaskName
from shallower.core.failures import failing, is_out_of_memory, sentence
from shallower.core.inputs import Inputs
from shallower.errors import ModelError
from shallower.saving.checkpoint import load, read_source
from shallower.saving.description import DESCRIPTION
from shallower.saving.hub import as_reachable, has_cached, is_reachable
from shallower.saving.sources import (
    format_options,
    import_transformers,
    model_class,
    parse_options,
    source_of,
    timm,
    torchvision,
)
from shallower.saving.vision import import_torchvision

ADAPTER = "adapter_config.json"
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\?.*)?")
_AUTO_CLASSES: Mapping[TaskName, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "image-feature-extraction": "AutoModel",
}
_ADAPTED_TASKS: Mapping[str, TaskName] = {
    "SEQ_CLS": "text-classification",
    "CAUSAL_LM": "causal-lm",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""What an adapter was trained for, in the words of peft."""

_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what its description says about it.

    Attributes:
        model: in eval mode.
        source: how `save` may say what it is; "" where nothing can rebuild it (a factory).
        processor: its tokenizer or image processor, from Transformers; None where there is none.
        no_processor: why there is none, where its files are there and cannot be read.
        example: inputs that a factory gave along with the model.
        dtype: what the model's weights are saved in, where it computes in a wider type.
    """

    model: nn.Module
    source: str
    processor: Any | None = None
    example: Inputs | None = None
    no_processor: str = ""
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def __post_init__(self) -> None:
        """Keep the type of the weights as they were read."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        object.__setattr__(self, "dtype", next(floating, torch.float32))

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
        if library == "timm":
            return torch.randn(batch, *_timm_size(self.model, rest), generator=generator)
        if library == "torchvision":
            return torch.randn(batch, *_torchvision_size(rest), generator=generator)
        if library == "transformers":
            return _transformers_inputs(self.model, batch, length, generator)
        raise ModelError(
            "nothing says what this model takes: let the factory return (model, example_inputs), or give --shape"
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
        spec: a directory written by `save`, a Transformers directory or hub name, a directory of a low-rank adapter
            (written by peft; it is merged into the model that it was trained on), `timm:NAME`, `torchvision:NAME` or
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
        if (path / ADAPTER).exists():
            return _adapted(path, task, num_labels)
        if not (path / "config.json").exists():
            raise ModelError(f"{spec}: neither a Transformers directory (config.json) nor one that save wrote")
        return _load_transformers(str(path), task, num_labels, pretrained)
    library, _, rest = spec.partition(":")
    if rest and library in ("timm", "torchvision"):
        name, options = parse_options(rest)
        pretrained = bool(options.pop("pretrained", pretrained))
        if num_labels is not None:
            options.setdefault("num_classes", num_labels)
        model = {"timm": timm, "torchvision": torchvision}[library](name, options, pretrained)
        return LoadedModel(model.eval(), f"{library}:{format_options(name, options)}")
    if _FACTORY.fullmatch(spec):
        return _factory(spec)
    if HUB_NAME.fullmatch(spec):
        return _load_transformers(spec, task, num_labels, pretrained)
    raise ModelError(
        f"{spec}: no such directory, and not a model name either: give a Transformers directory or hub name, "
        "timm:NAME, torchvision:NAME or package.module:factory"
    )


def _timm_size(model: nn.Module, description: str) -> tuple[int, ...]:
    resolve = importlib.import_module("timm.data").resolve_data_config
    sizes = {key: value for key, value in parse_options(description)[1].items() if key in ("in_chans", "img_size")}
    given: tuple[int, ...] = resolve(sizes, model=model)["input_size"]
    return (int(sizes.get("in_chans", given[0])), *given[1:])


def _torchvision_size(description: str) -> tuple[int, int, int]:
    name, options = parse_options(description)
    preset = import_torchvision().models.get_model_weights(name).DEFAULT.transforms
    size = options.get("image_size", preset.keywords["crop_size"])
    return 3, int(size), int(size)


# ------------------------------------------------------------------------------------------------------- factory


def _factory(spec: str) -> LoadedModel:
    path, options = parse_options(spec)
    package, _, name = path.partition(":")
    with foreign_code(ModelError, spec), _importable(str(Path.cwd())):
        factory = getattr(importlib.import_module(package), name)
        made = factory(**options)
    model, example = made, None
    if isinstance(made, tuple) and len(made) == 2:
        model, example = made
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}: returned a {type(model).__name__}, not a torch.nn.Module")
    return LoadedModel(model.eval(), source_of(model), None, example)


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Meanwhile modules of `folder` can be imported."""
    if "" in sys.path or folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _load_transformers(spec: str, task: TaskName | None, num_labels: int | None, pretrained: bool) -> LoadedModel:
    library = import_transformers()
    local = Path(spec).is_dir()
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    labels = {}
    if num_labels is not None:
        labels["num_labels"] = num_labels
    model: Any
    with _reading(spec):
        config = library.AutoConfig.from_pretrained(spec, **where, **labels)
        architecture = _architecture(library, task, config)
        if not pretrained:
            of_config = getattr(architecture, "from_config", None) or architecture._from_config
            model = of_config(config)
        else:
            model = architecture.from_pretrained(
                spec, config=config, ignore_mismatched_sizes=num_labels is not None, **where
            )
        processor, no_processor = _processor(library, spec, model, where)
    if task == "text-classification" and processor is not None:
        # GPT-like models have no padding token, and cannot tell a row's last token without one.
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return LoadedModel(model.eval(), source_of(model), processor, no_processor=no_processor)


def _adapted(path: Path, task: TaskName | None, num_labels: int | None) -> LoadedModel:
    """The model that a low-rank adapter was trained on, with the adapter merged into its layers."""
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path}: an adapter lies there without adapter_model.safetensors; save it as safetensors")
    with failing(ModelError, str(path / ADAPTER)):
        described = json.loads((path / ADAPTER).read_text())
        base = str(described["base_model_name_or_path"])
        task = task or _ADAPTED_TASKS.get(described.get("task_type") or "")
    if not Path(base).is_dir() and not HUB_NAME.fullmatch(base):
        raise ModelError(f"{path / ADAPTER}: the adapter was trained on {base!r:.80}, which is no directory here")
    import_transformers()
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"{path}: a low-rank adapter is read by peft ({error}); install it: pip install peft"
        ) from error
    loaded = _load_transformers(base, task, num_labels, pretrained=True)
    with failing(ModelError, str(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries to each other
        merged = peft.PeftModel.from_pretrained(loaded.model, str(path)).merge_and_unload()
    return LoadedModel(merged.eval(), source_of(merged), loaded.processor, no_processor=loaded.no_processor)


@contextmanager
def _reading(spec: str) -> Iterator[None]:
    """Let what fails in reading a Transformers directory, or a model of the hub, be one sentence, and soon."""
    if Path(spec).is_dir():
        with failing(ModelError, spec):
            yield
        return
    if not is_reachable() and not has_cached(spec):
        raise ModelError(f"{spec}: there is no such directory, and the hub cannot be reached")
    with failing(ModelError, f"{spec}: there is no such directory, and the hub gives no such model"), as_reachable():
        yield


def config_of(spec: str) -> Mapping[str, Any]:
    """What the config of a Transformers model says, in its directory or on the hub; nothing of any other model.

    Raises:
        ModelError: it cannot be read, or the hub has no such model.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        spec = str(path)
    if not (path / "config.json").is_file() and (path.is_dir() or not HUB_NAME.fullmatch(spec)):
        return {}
    with _reading(spec):
        config, _ = import_transformers().PretrainedConfig.get_config_dict(spec)
        return dict(config)


def _architecture(library: ModuleType, task: TaskName | None, config: Any) -> Any:
    if task is not None:
        return getattr(library, _AUTO_CLASSES[task])
    for name in config.architectures or ():
        architecture = model_class(library, name)
        if architecture is not None:
            return architecture
    return library.AutoModel


def _processor(library: ModuleType, spec: str, model: Any, where: Mapping[str, Any]) -> tuple[Any | None, str]:
    """The tokenizer or image processor that lies beside the weights; or None, and why it cannot be read."""
    auto, names = library.AutoTokenizer, ("tokenizer_config.json", "tokenizer.json")
    if model.main_input_name == "pixel_values":
        auto, names = library.AutoImageProcessor, ("preprocessor_config.json", "processor_config.json")
    local = Path(spec).is_dir()
    if local and not any((Path(spec) / name).exists() for name in names):
        return None, ""
    try:
        return auto.from_pretrained(spec, **where), ""
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not local and isinstance(error, OSError):
            return None, ""
        return None, f"{spec}: {names[0]} and what belongs to it cannot be read: {sentence(error)}"


def _saved(path: Path) -> LoadedModel:
    model, source = load(path), read_source(path)
    if not source.startswith("transformers:"):
        return LoadedModel(model, source)
    where = {"trust_remote_code": False, "local_files_only": True}
    processor, no_processor = _processor(import_transformers(), str(path), model, where)
    return LoadedModel(model, source, processor, no_processor=no_processor)


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
        shape: tuple[int, ...] = (16000,)
        if getattr(config, "num_mel_bins", None):
            shape = (config.max_length, config.num_mel_bins)
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
    if isinstance(positions, int) and positions > 2:
        length = min(length, positions - 2)
    ordinary = set(range(text.vocab_size))
    for owner, name in product((config, text), _SPECIAL_TOKENS):
        special = getattr(owner, name, None)
        if not isinstance(special, list):
            special = [special]
        ordinary.difference_update(special)
    known = torch.tensor(sorted(ordinary))
    ids = known[torch.randint(len(known), (batch, length), generator=generator)]
    if getattr(config, "is_encoder_decoder", False) and isinstance(text.eos_token_id, int):
        # Classifiers of this kind read the position of the end token.
        ids[:, -1] = text.eos_token_id
    return ids


def _image_size(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", 224)
    if not isinstance(size, (list, tuple)):
        size = (size, size)
    height, width = size
    return int(getattr(config, "num_channels", 3)), int(height), int(width)
