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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

from shallower.errors import CheckpointError, ModelError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.modules.edits import replay
from shallower.saving.card import NAME as CARD
from shallower.saving.card import plain_card
from shallower.saving.description import BUFFERS, CONFIG, DESCRIPTION, Description
from shallower.saving.reading import read_buffers, read_config, read_description, read_generation_config, read_tensors
from shallower.saving.slots import check_fits, describe, put_in, unwrapped, without_weights
from shallower.saving.sources import build_skeleton, source_of
from shallower.saving.writing import check_replaceable, replacing, write_tensors

"""The version before, which is read too: it knew fewer kinds of edits."""
_FACTORY = re.compile(r"[\w.]+:\w+(\?.*)?")


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
    model = unwrapped(model)
    if any(attached_places(module) for module in model.modules()):
        model = detached_copy(model)
    source = source_of(model) if source is None else source
    config = _config_of(model)
    description, tensors, buffers = describe(model, source, training)
    _check_source(description, config)
    directory = Path(directory).expanduser().resolve()
    check_replaceable(directory)
    with replacing(directory) as partial:
        write_tensors(partial, tensors, max_shard_size)
        if buffers:
            save_file(buffers, partial / BUFFERS)
        if config is not None:
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
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
    description = read_description(directory)
    if model is None:
        skeleton = _skeleton(description, read_config(directory, description.source), str(directory))
    else:
        skeleton = without_weights(model)
        replay(skeleton, description.edits)
    check_fits(skeleton, description)
    put_in(skeleton, description, read_tensors(directory, description), read_buffers(directory, description))
    read_generation_config(skeleton, directory)
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


def _skeleton(description: Description, config: Mapping[str, Any] | None, where: str) -> nn.Module:
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


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """What goes into config.json for a Transformers model."""
    if not source_of(model):
        return None
    config = copy.deepcopy(cast("Any", model).config)
    config.architectures = [type(model).__name__]
    config.dtype = cast("Any", model).dtype
    result: dict[str, Any] = json.loads(config.to_json_string())
    return result


def _check_source(description: Description, config: Mapping[str, Any] | None) -> None:
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
        check_fits(skeleton, description)
    except CheckpointError as error:
        raise CheckpointError(
            f"this model is not what {source!r:.80} and the recorded surgery rebuild: {error} "
            "Give the right source, or source='' and read it with load(directory, model=fresh)."
        ) from error
