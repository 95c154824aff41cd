"""Save a squeezed model and load it again: safetensors and JSON, never pickle.

    sh.save(small, "out/")
    small = sh.load("out/")

A directory holds the tensors, where the original architecture comes from, and what surgery did to it. Loading builds
the architecture without weights, does the surgery again, and puts the tensors in. docs/format.md describes the files.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shallower.core.files import replacing, write_json, write_tensors, write_text
from shallower.errors import CheckpointError, ModelError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.modules.edits import replay
from shallower.saving.card import NAME as CARD
from shallower.saving.card import plain_card
from shallower.saving.collecting import collected
from shallower.saving.description import BUFFERS, CONFIG, DESCRIPTION, Description
from shallower.saving.implementations import implementations_of_parts
from shallower.saving.reading import read_buffers, read_config, read_description, read_generation_config, read_weights
from shallower.saving.skeletons import Limits, build_skeleton
from shallower.saving.slots import Stored, check_tensors_fit, check_whole, put_in, stored, unwrapped, without_weights
from shallower.saving.sources import LIBRARIES, source_of
from shallower.saving.stock.recorded import KEY, record, surgery_record, without_record
from shallower.saving.stock.statement import NOTE, RAN, stock_of
from shallower.saving.writing import bytes_of, check_as_written, check_replaceable, write_weights

_INFORMS = re.compile(r"[\w.]+:\w+(\?.*)?")


def save(
    model: nn.Module,
    directory: str | Path,
    source: str | None = None,
    processor: Any | None = None,
    *,
    beside: Callable[[Path], object] | None = None,
    training: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model so that `load` returns one with the same outputs to the last bit.

        sh.save(small, "out/", processor=tokenizer)
        sh.save(small, "out/", source="torchvision:vgg16_bn?num_classes=10")

    The directory appears whole or not at all: it is written beside its place, read back and compared with the model,
    and then renamed. An earlier one is replaced if it is empty or holds nothing but an earlier result. What a method
    attached to the model is left out. A part of a squeezed model, a model with squeezed parts, and a wrapped model
    (torch.compile, DistributedDataParallel) are saved like any other.

    Args:
        model: any model; the modules that surgery changed carry the record of it.
        directory: where to.
        source: how to build the architecture before any surgery: "timm:NAME?option=value", "torchvision:NAME?..." or
            "transformers:CLASS". By default it is read off a Transformers model. Without one, and with a
            "package.module:factory", which only informs, the directory is read by `load(directory, model=fresh)`.
        processor: a tokenizer or image processor to lie beside the model; anything with `save_pretrained`.
        beside: called with the directory before it takes its name, to write further files into it.
        training: what to remember of how the model came about; plain JSON data.
        max_shard_size: larger models are split into several files of at most this size: bytes, or text as "5GB".

    Raises:
        CheckpointError: the source and the edits do not rebuild this model, something that belongs to it cannot be
            written, or the directory holds other things.
    """
    most = bytes_of(max_shard_size)
    model, source, kept, description = _contents(model, source, training)
    config = _config_of(model)
    _check_names(source, config)
    directory = _resolved(directory)
    check_replaceable(directory)
    stock = stock_of(description, config, kept.buffers, vars(model).get(NOTE, ""), RAN in vars(model))
    description = replace(description, stock=stock)
    if config is not None and stock.why:
        config.setdefault(KEY, surgery_record(model))
    with replacing(directory, error=CheckpointError) as partial:
        if config is not None:
            write_json(partial / CONFIG, config, error=CheckpointError)
        write_json(partial / DESCRIPTION, description.to_json(), error=CheckpointError)
        # Everything is read from the files from here on, as `load` will.
        _prove(model, partial)
        write_weights(partial, kept.tensors, most)
        if kept.buffers:
            write_tensors(partial / BUFFERS, kept.buffers, error=CheckpointError)
        check_as_written(kept.tensors, read_weights(partial, description))
        check_as_written(kept.buffers, read_buffers(partial, description))
        if config is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(partial)  # type: ignore[union-attr,operator]
        if processor is not None:
            processor.save_pretrained(partial)
        if beside is not None:
            beside(partial)
        if not (partial / CARD).exists():
            write_text(partial / CARD, plain_card(directory.name, source, str(stock)), error=CheckpointError)
        written = (path for path in partial.rglob("*") if path.is_file() and path.name != DESCRIPTION)
        description = replace(description, files=sorted(str(path.relative_to(partial)) for path in written))
        write_json(partial / DESCRIPTION, description.to_json(), error=CheckpointError)


def check_source(model: nn.Module, source: str | None = None) -> None:
    """Check that `save` would accept this model with this source; nothing is written.

        check_source(model, "timm:resnet18")        # before hours of work on it

    Raises:
        CheckpointError: it would not.
    """
    model, source, _, description = _contents(model, source, None)
    config = _config_of(model)
    _check_names(source, config)
    _check_rebuilt(model, description, config)


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that `save` wrote, in eval mode.

        small = sh.load("out/")
        small = sh.load("out/", model=MyNet())       # a model of your own class, as it was before any surgery
        small = sh.load("out/", device="cuda", dtype=torch.bfloat16)

    Nothing that the files name is imported except classes of Transformers, timm and torchvision, and nothing is
    fetched.

    Args:
        directory: as given to `save`.
        model: a fresh instance of the original architecture, whatever its weights; it is not changed. Needed where the
            directory names no library's architecture.
        device: where to put the model; the CPU by default.
        dtype: of its floating-point numbers; as they were saved by default.

    Raises:
        CheckpointError: a file is missing, damaged, of an unknown version or leads out of the directory; or tensors,
            edits and architecture do not fit together.
    """
    directory = Path(directory).expanduser()
    description = read_description(directory)
    if model is None:
        skeleton = _skeleton(description, read_config(directory, description.source), str(directory))
    else:
        skeleton = _fresh(description, model)
    put_in(skeleton, description, read_weights(directory, description), read_buffers(directory, description))
    read_generation_config(skeleton, directory)
    if source_of(skeleton):
        record(skeleton, needed=bool(description.stock.why))
    if device is not None or dtype is not None:
        skeleton = skeleton.to(device=device, dtype=dtype)
    return skeleton.eval()


def read_source(directory: str | Path) -> str:
    """The source that a saved directory names; "" where it has none.

    Raises:
        CheckpointError: it is not a directory that `save` wrote.
    """
    return read_description(Path(directory)).source


def read_training(directory: str | Path) -> dict[str, Any]:
    """What `save` was given as `training`.

    Raises:
        CheckpointError: it is not a directory that `save` wrote.
    """
    return read_description(Path(directory)).training


# --------------------------------------------------------------------------------------------------- before writing


def _contents(
    model: nn.Module, source: str | None, training: Mapping[str, Any] | None
) -> tuple[nn.Module, str, Stored, Description]:
    """The model itself, its source, what is to be written of it, and the description."""
    model = unwrapped(model)
    if any(attached_places(module) for module in model.modules()):
        model = detached_copy(model)
    if source is None:
        source = source_of(model)
    kept = stored(model)
    try:
        record = json.loads(json.dumps(dict(training or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the training record is not plain JSON data: {error}") from error
    description = Description(
        source=source,
        edits=collected(model),
        tensors={name: kept.entries[name] for name in kept.tensors},
        buffers={name: kept.entries[name] for name in kept.buffers},
        tied=kept.tied,
        frozen=kept.frozen,
        training=record,
        files=[],
    )
    return model, source, kept, description


def _resolved(directory: str | Path) -> Path:
    try:
        return Path(directory).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(directory)!r:.200} is not the name of a directory: {error}") from error


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """What goes into config.json for a Transformers model."""
    if not source_of(model):
        return None
    config = copy.deepcopy(cast("Any", model).config)
    config.architectures = [type(model).__name__]
    config.dtype = cast("Any", model).dtype
    result: dict[str, Any] = json.loads(config.to_json_string())
    return without_record(result)


def _names_library(source: str) -> bool:
    return source.partition(":")[0] in LIBRARIES


def _check_names(source: str, config: Mapping[str, Any] | None) -> None:
    if not source or _names_library(source):
        if source.startswith("transformers:") and config is None:
            raise CheckpointError(f"{source!r:.80}: this is not a model of the transformers package")
        return
    if not _INFORMS.fullmatch(source):
        raise CheckpointError(f"{source!r:.80} is no source: write timm:NAME, torchvision:NAME or transformers:CLASS")


def _prove(model: nn.Module, partial: Path) -> None:
    description = read_description(partial)
    _check_rebuilt(model, description, read_config(partial, description.source))


def _check_rebuilt(model: nn.Module, description: Description, config: Mapping[str, Any] | None) -> None:
    """Build the model again without weights, where its source says how."""
    source = description.source
    if not _names_library(source):
        return
    try:
        skeleton = _skeleton(description, config, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"this model is not what {source!r:.80} and the recorded surgery rebuild: {error} "
            "Give the right source, or source='' and read it with load(directory, model=fresh)."
        ) from error
    rebuilt = implementations_of_parts(skeleton)
    for name, own in implementations_of_parts(model).items():
        if rebuilt.get(name) != own:
            raise CheckpointError(
                f"{name or 'the model'}: attention and experts are computed by {own}, and its config rebuilds "
                f"{rebuilt.get(name)}, which rounds differently. Choose it with model.set_attn_implementation(...)"
            )


# ------------------------------------------------------------------------------------------------------- skeletons


def _skeleton(description: Description, config: Mapping[str, Any] | None, where: str) -> nn.Module:
    """The architecture that the files name, after surgery; it fits the tensors that they describe."""
    if not _names_library(description.source):
        made = f"it was made by {description.source!r:.80}, which is not imported unasked" * bool(description.source)
        raise CheckpointError(
            f"{where}: {made or 'the files do not say how the model is built'}; give a fresh instance: "
            "load(directory, model=...)"
        )

    def fits(draft: nn.Module) -> None:
        check_tensors_fit(replay(draft, description.edits), description)

    # No surgery takes more than a handful of tensors away, and a class may make some that it then ties.
    most = 4 * (len(description.names) + 8 * len(description.edits)) + 64
    try:
        skeleton = build_skeleton(description.source, config, limits=Limits(most, description.largest), fits=fits)
    except ModelError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return _operated(skeleton, description)


def _fresh(description: Description, model: nn.Module) -> nn.Module:
    """A copy of a fresh instance, after surgery."""
    try:
        return _operated(without_weights(model), description)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Give an instance that is built as the model was before surgery; a layer that was exchanged by "
            "hand afterwards must be exchanged in it, too."
        ) from error


def _operated(skeleton: nn.Module, description: Description) -> nn.Module:
    # All tensors of the new modules come from the files.
    with torch.device("meta"):
        replay(skeleton, description.edits)
    check_tensors_fit(skeleton, description)
    check_whole(skeleton)
    return skeleton
