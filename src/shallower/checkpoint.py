"""Save a squeezed model and load it again: safetensors and JSON, never pickle.

    sh.save(small, "out/")
    small = sh.load("out/")

A directory holds the tensors, where the original architecture comes from, and what surgery did to it. Loading builds
the architecture without weights, does the surgery again, and puts the tensors in. docs/format.md describes the files.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shallower.attachment import attached_places, detach, detached_copy
from shallower.edits import edits, replay
from shallower.errors import CheckpointError, ModelError
from shallower.model_card import NAME as CARD
from shallower.model_card import plain_card
from shallower.models import DESCRIPTION, build_skeleton, source_of

SCHEMA = "shallower"
VERSION = 2
_EARLIER = 1
"""The version before, which is read too: it knew fewer kinds of edits."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BUFFERS = "buffers.safetensors"
_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FACTORY = re.compile(r"[\w.]+:\w+(\?.*)?")
_MOST_JSON = 64 << 20
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}


def save(
    model: nn.Module,
    directory: str | Path,
    source: str | None = None,
    processor: Any | None = None,
    *,
    training: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model so that `load` gives the same outputs to the last bit.

        sh.save(small, "out/", processor=tokenizer)
        sh.save(small, "out/", source="torchvision:vgg16_bn?num_classes=10")

    The directory appears whole or not at all: it is written beside its place and then renamed. One that is there
    already is replaced if it is empty or holds nothing but an earlier result. What is attached to the model is left
    out.

    Args:
        model: any model; one that surgery made carries the record of its edits.
        directory: where to.
        source: how to build the architecture before any surgery: "timm:NAME?option=value", "torchvision:NAME?..." or
            "transformers:CLASS". Told from the model itself where it is a Transformers model. Without one, and with
            a "package.module:factory", which only informs, the directory is read by `load(directory, model=fresh)`.
        processor: a tokenizer or image processor to lie beside it; anything with `save_pretrained`.
        training: what is to be remembered of how the model came about; plain JSON data.
        max_shard_size: larger models are split into several files of at most this size.

    Raises:
        CheckpointError: the source and the edits do not rebuild this model, a tensor cannot be written, or the
            directory holds other things.
    """
    model = _unwrapped(model)
    if any(attached_places(module) for module in model.modules()):
        model = detached_copy(model)
    source = source_of(model) if source is None else source
    config = _config_of(model)
    description, tensors, buffers = _describe(model, source, training)
    _check_source(description, config)
    directory = Path(directory).expanduser().resolve()
    check_replaceable(directory)
    with _replacing(directory) as partial:
        _write_tensors(partial, tensors, max_shard_size)
        if buffers:
            save_file(buffers, partial / _BUFFERS)
        if config is not None:
            (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            if model.can_generate():  # type: ignore[operator]
                model.generation_config.save_pretrained(partial)  # type: ignore[union-attr,operator]
        if processor is not None:
            processor.save_pretrained(partial)
        if not (partial / CARD).exists():
            (partial / CARD).write_text(plain_card(directory.name, source), encoding="utf-8")
        description.files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        (partial / DESCRIPTION).write_text(json.dumps(description.to_json(), allow_nan=False, indent=1) + "\n")


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, in eval mode, on the CPU.

        small = sh.load("out/")
        small = sh.load("out/", model=MyNet())       # a model of your own class, as it was before any surgery

    Nothing that the files name is imported except classes of Transformers, timm and torchvision.

    Args:
        directory: as given to `save`.
        model: a fresh instance of the original architecture, whatever its weights; it is not changed. Needed where the
            directory names no library's architecture.

    Raises:
        CheckpointError: a file is missing, damaged, of an unknown version or leads out of the directory; or tensors,
            edits and architecture do not fit together.
    """
    directory = Path(directory).expanduser()
    description = _read_description(directory)
    if model is None:
        skeleton = _skeleton(description, _read_config(directory, description.source), str(directory))
    else:
        skeleton = _without_weights(model)
        replay(skeleton, description.edits)
    _check_fits(skeleton, description)
    _put_in(skeleton, description, _read_tensors(directory, description), _read_buffers(directory, description))
    _read_generation_config(skeleton, directory)
    return skeleton.eval()


def read_source(directory: str | Path) -> str:
    """The source that a saved directory names; "" where it has none.

    Raises:
        CheckpointError: it is not a directory that `save` wrote.
    """
    return _read_description(Path(directory)).source


def read_training(directory: str | Path) -> dict[str, Any]:
    """What `save` was given as `training`.

    Raises:
        CheckpointError: it is not a directory that `save` wrote.
    """
    return _read_description(Path(directory)).training


# -------------------------------------------------------------------------------------------------- description


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file; `order` lists its dimensions from the slowest to the fastest where that is not their own."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> _Entry:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
        plain = tensor.is_contiguous() or not tensor.permute(order).is_contiguous()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), () if plain else order)

    @classmethod
    def from_json(cls, name: str, data: Any) -> _Entry:
        if not isinstance(data, dict) or not {"dtype", "shape"} <= set(data) <= {"dtype", "shape", "order"}:
            raise CheckpointError(f"tensor {name}: it is described by a dtype, a shape and perhaps an order")
        dtype, shape, order = data["dtype"], data["shape"], data.get("order", [])
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name}: the dtype {dtype!r:.40} is unknown")
        if not _are_counts(shape):
            raise CheckpointError(f"tensor {name}: {shape!r:.80} is not a shape")
        if not _are_counts(order) or (order and sorted(order) != list(range(len(shape)))):
            raise CheckpointError(f"tensor {name}: {order!r:.80} is not an order of its dimensions")
        return cls(dtype, tuple(shape), tuple(order))

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return {**plain, "order": list(self.order)} if self.order else plain

    def arranged(self, tensor: Tensor) -> Tensor:
        """A copy of the `tensor` of a file, in the memory layout that it had.

        Copied also where the layout is the same: in a mapped file a tensor starts at any multiple of 8 bytes, and on
        that depends which kernel computes with it, hence the last bit of the result.
        """
        if not self.order:
            return tensor.clone()
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return tensor.permute(self.order).contiguous().permute(inverse)


@dataclass
class _Description:
    """What shallower.json says."""

    source: str
    edits: list[dict[str, Any]]
    tensors: dict[str, _Entry]
    buffers: dict[str, _Entry]
    tied: list[list[str]]
    frozen: list[str]
    training: dict[str, Any]
    files: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[str, str]:
        """Every name that a parameter or persistent buffer of the model has -> the name it has in the files."""
        own = {name: name for name in self.tensors}
        return own | {alias: first for first, *aliases in self.tied for alias in aliases}

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "source": self.source,
            "edits": self.edits,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "buffers": {name: entry.to_json() for name, entry in self.buffers.items()},
            "tied": self.tied,
            "frozen": self.frozen,
            "training": self.training,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, data: Any) -> _Description:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError("this is not the description of a saved model")
        if type(data.get("version")) is not int or data["version"] not in (_EARLIER, VERSION):
            raise CheckpointError(
                f"the files have version {data.get('version')!r:.40} of the format, and this Shallower reads version "
                f"{VERSION}; install a newer one"
            )
        kinds: dict[str, type] = {
            **{"source": str, "edits": list, "tensors": dict, "buffers": dict, "tied": list, "frozen": list},
            **{"training": dict, "files": list},
        }
        odd = set(data) ^ {"schema", "version", *kinds}
        if odd:
            raise CheckpointError(f"missing or unknown keys: {', '.join(sorted(odd))[:200]}")
        for key, kind in kinds.items():
            if not isinstance(data[key], kind):
                raise CheckpointError(f"{key} is a {kind.__name__}, not a {type(data[key]).__name__}")
        tensors = {name: _Entry.from_json(name, entry) for name, entry in data["tensors"].items()}
        buffers = {name: _Entry.from_json(name, entry) for name, entry in data["buffers"].items()}
        taken = {*tensors, *buffers}
        for group in data["tied"]:
            if not _are_names(group) or len(group) < 2 or group[0] not in tensors:
                raise CheckpointError(f"{group!r:.80} is not a group of tied names")
            for alias in group[1:]:
                if alias in taken:
                    raise CheckpointError(f"tensor {alias:.80}: it is named twice")
                taken.add(alias)
        if not _are_names(data["frozen"]) or not set(data["frozen"]) <= set(tensors):
            raise CheckpointError("frozen names a tensor that is not there")
        if not _are_names(data["files"]):
            raise CheckpointError("files is a list of names")
        return cls(**{**{key: data[key] for key in kinds}, "tensors": tensors, "buffers": buffers})


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with nothing attached and its parameters on the meta device."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    duplicate = copy.deepcopy(_unwrapped(model), cast(dict[int, Any], empty))
    detach(duplicate)
    return duplicate


def _skeleton(description: _Description, config: Mapping[str, Any] | None, where: str) -> nn.Module:
    if not _names_library(description.source):
        made = f"it was made by {description.source!r:.80}, which is not imported unasked" * bool(description.source)
        raise CheckpointError(
            f"{where}: {made or 'the files do not say how the model is built'}; give a fresh instance: "
            "load(directory, model=...)"
        )
    try:
        # No surgery takes more than a handful of tensors away, and a class may make some that it then ties.
        most = 4 * (len(description.names) + 8 * len(description.edits)) + 64
        skeleton = build_skeleton(description.source, config, most_parameters=most)
    except ModelError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return replay(skeleton, description.edits)


def _names_library(source: str) -> bool:
    return source.partition(":")[0] in ("transformers", "timm", "torchvision")


def _describe(
    model: nn.Module, source: str, training: Mapping[str, Any] | None
) -> tuple[_Description, dict[str, Tensor], dict[str, Tensor]]:
    """The description of a model, its tensors and its non-persistent buffers, ready to be written."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{name}: a {type(module).__name__} keeps extra state that is not a tensor")
    tensors: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    entries: dict[str, _Entry] = {}
    groups: dict[Any, list[str]] = {}
    frozen = []
    for name, slot in _slots(model).items():
        tensor = slot.tensor
        if type(tensor.detach()) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"tensor {name}: a {type(tensor).__name__} ({tensor.layout}) cannot be saved")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name}: it is on the meta device and has no values to save")
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise CheckpointError(f"tensor {name}: the dtype {tensor.dtype} cannot be saved")
        entries[name] = _Entry.of(tensor)
        if slot.kind == "transient":
            buffers[name] = _alone(tensor)
            continue
        group = groups.setdefault(_identity(tensor), [])
        group.append(name)
        if len(group) == 1:
            tensors[name] = _alone(tensor)
            if slot.kind == "parameter" and tensor.is_floating_point() and not tensor.requires_grad:
                frozen.append(name)
    description = _Description(
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
    return _Description.from_json(again), tensors, buffers


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are one and the same memory."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _alone(tensor: Tensor) -> Tensor:
    """The values on the CPU, contiguous, in a storage that holds nothing else."""
    values = tensor.detach().cpu().contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """What goes into config.json for a Transformers model."""
    if not source_of(model):
        return None
    config = copy.deepcopy(cast(Any, model).config)
    config.architectures = [type(model).__name__]
    config.dtype = cast(Any, model).dtype
    result: dict[str, Any] = json.loads(config.to_json_string())
    return result


def _check_source(description: _Description, config: Mapping[str, Any] | None) -> None:
    """Build the model again without weights, so that what is written can be read."""
    source = description.source
    if not source or (not _names_library(source) and _FACTORY.fullmatch(source)):
        return
    if not _names_library(source):
        raise CheckpointError(f"{source!r:.80} is no source: write timm:NAME, torchvision:NAME or transformers:CLASS")
    if source.startswith("transformers:") and config is None:
        raise CheckpointError(f"{source!r:.80}: this is not a model of the transformers package")
    try:
        skeleton = _skeleton(description, config, source)
        _check_fits(skeleton, description)
    except CheckpointError as error:
        raise CheckpointError(
            f"this model is not what {source!r:.80} and the recorded surgery rebuild: {error} "
            "Give the right source, or source='' and read it with load(directory, model=fresh)."
        ) from error


def _check_fits(skeleton: nn.Module, description: _Description) -> None:
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
        dtype = _DTYPES[entry.dtype]
        if dtype.is_floating_point != tensor.is_floating_point() or dtype.is_complex != tensor.is_complex():
            raise CheckpointError(f"tensor {name}: it is {entry.dtype} in the files and {tensor.dtype} in the model.")
    for prefix, module in skeleton.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(f"{prefix}.{attribute}: a tensor that no state dict holds cannot be rebuilt.")


def _put_in(
    skeleton: nn.Module, description: _Description, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
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


# ------------------------------------------------------------------------------------------------------- reading


def _read_json(directory: Path, name: str) -> Any:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key is given twice")
        return result

    path = _inside(directory, name)
    try:
        if path.stat().st_size > _MOST_JSON:
            raise CheckpointError(f"{path}: larger than {_MOST_JSON >> 20} MiB, too large to be a description")
        return json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error


def _inside(directory: Path, name: str) -> Path:
    """The file of that name, which must lie in the directory itself."""
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path}: leads out of the directory; copy the file itself into it")
    return path


def _read_description(directory: Path) -> _Description:
    if not directory.is_dir():
        kept = sorted(directory.parent.glob(f".{directory.name}.previous-*")) if directory.name else []
        hint = f"; an interrupted save left the earlier one at {kept[-1]}, rename it" if kept else ""
        raise CheckpointError(f"{directory}: there is no such directory{hint}")
    try:
        return _Description.from_json(_read_json(directory, DESCRIPTION))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}" if str(directory) not in str(error) else str(error)) from error


def _read_config(directory: Path, source: str) -> dict[str, Any] | None:
    if not source.startswith("transformers:"):
        return None
    config = _read_json(directory, _CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / _CONFIG}: not the config of a model")
    return config


def _read_tensors(directory: Path, description: _Description) -> dict[str, Tensor]:
    if not (directory / _INDEX).exists():
        return _read_safetensors(directory, _WEIGHTS, description.tensors)
    index = _read_json(directory, _INDEX)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{directory / _INDEX}: not the index of a model in several files")
    shards: dict[str, dict[str, _Entry]] = {}
    for name, shard in shard_of.items():
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(f"{directory / _INDEX}: {shard!r:.200} is not the name of a file beside it")
        if name not in description.tensors:
            raise CheckpointError(f"tensor {name:.200}: it is in the index and not in {DESCRIPTION}")
        shards.setdefault(shard, {})[name] = description.tensors[name]
    absent = next((name for name in description.tensors if name not in shard_of), None)
    if absent is not None:
        raise CheckpointError(f"tensor {absent}: it is not in the index")
    tensors: dict[str, Tensor] = {}
    for shard, entries in shards.items():
        tensors |= _read_safetensors(directory, shard, entries)
    return tensors


def _read_buffers(directory: Path, description: _Description) -> dict[str, Tensor]:
    return _read_safetensors(directory, _BUFFERS, description.buffers) if description.buffers else {}


def _read_safetensors(directory: Path, name: str, entries: Mapping[str, _Entry]) -> dict[str, Tensor]:
    path = _inside(directory, name)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error
    for key in (*entries, *tensors):
        if key not in tensors:
            raise CheckpointError(f"tensor {key}: it is not in {path}")
        if key not in entries:
            raise CheckpointError(f"tensor {key:.200}: it is in {path} and not in {DESCRIPTION}")
        found = _Entry.of(tensors[key])
        if (found.dtype, found.shape) != (entries[key].dtype, entries[key].shape):
            raise CheckpointError(
                f"tensor {key}: {path} has it as {found.dtype} {list(found.shape)}, and {DESCRIPTION} as "
                f"{entries[key].dtype} {list(entries[key].shape)}"
            )
    return tensors


def _read_generation_config(model: nn.Module, directory: Path) -> None:
    if not source_of(model) or not (directory / _GENERATION).exists():
        return
    settings = _read_json(directory, _GENERATION)
    try:
        cast(Any, model).generation_config = type(cast(Any, model).generation_config).from_dict(settings)
    except Exception as error:
        raise CheckpointError(f"{directory / _GENERATION}: not a generation config: {error}") from error


# ------------------------------------------------------------------------------------------------------- writing


def _write_tensors(directory: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, directory / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError unless `save` may write to `directory`: it is not there, is empty or an earlier result."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: this is a file, and a directory is to be written")
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    if not there:
        return
    advice = "give another directory, or remove it first"
    if DESCRIPTION not in there:
        raise CheckpointError(f"{directory}: not empty, and not the result of an earlier save; {advice}")
    foreign = sorted(there - {DESCRIPTION, *_read_description(directory).files})
    if foreign:
        raise CheckpointError(f"{directory}: holds {foreign[0]}, which no save wrote; {advice}")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` at the end, or leaves no trace."""
    token = secrets.token_hex(4)
    partial = directory.with_name(f".{directory.name}.partial-{token}")
    previous = directory.with_name(f".{directory.name}.previous-{token}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        if directory.exists():
            directory.rename(previous)
        try:
            partial.rename(directory)
        except BaseException:
            if previous.exists():
                previous.rename(directory)
            raise
        _to_disk(directory.parent)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
