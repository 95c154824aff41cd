"""Batches of the rows of the data, as a model takes them; `data/readers.py` turns rows into batches.

batches = make_batches(rows, "text-classification", loaded)
batches.train, batches.validation, batches.counts
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from shallower.app.data.readers import (
    Augmented,
    ImageFormat,
    ImageReader,
    Reader,
    TextReader,
    TokenReader,
    packed,
)
from shallower.app.data.rows import Rows
from shallower.app.models import LoadedModel
from shallower.app.options import DataOptions, TaskName
from shallower.app.tasks import class_count, first_output
from shallower.core.inputs import Inputs, default_inputs_of
from shallower.core.memory import total_bytes
from shallower.core.text import amount
from shallower.core.trees import rows_of
from shallower.errors import DataError

MOST_SCORED = 2000
"""Rows on which a model is scored: more make a score hardly more certain, and cost time."""

EXAMPLE = 8
"""Rows of the example inputs, on which sites are found, surgery is proven and latencies are measured."""


def loader(rows: Any, reader: Reader, batch_size: int | None, seed: int | None = None) -> DataLoader[Any]:
    """A loader of the batches that `reader` makes of `rows`; with a seed, shuffled anew in each pass.

    Without a `batch_size` each of `rows` is a batch already, which `reader` is given.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch_size=batch_size, shuffle=seed is not None, generator=generator, collate_fn=reader)


def drawn_rows(batches: DataLoader[Any], rows: int, seed: int) -> DataLoader[Any]:
    """At most so many rows of a loader, drawn at random and in their order; the same in every call."""
    data: Any = batches.dataset
    counts = _counts(batches)
    chosen: list[int] = []
    found = 0
    for index in torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist():
        if found + counts[index] <= rows or not chosen:
            chosen.append(index)
            found += counts[index]
        if found >= rows:
            break
    reader: Any = batches.collate_fn
    return loader(Subset(data, sorted(chosen)), reader, batches.batch_size)


@dataclass(frozen=True)
class TaskBatches:
    """What a model is trained, validated and tested on.

    Attributes:
        train: shuffled anew in each pass.
        validation: to choose on.
        test: to report on; `validation` where the data has no test split.
        example: the model's inputs of the first rows of `validation`.
        seed: of the rows that `sampled` draws.
        classes: names of the classes, where they have some.
        remarks: what people should know of it.
        whole: with all rows to choose and to report on, where these are some of them.
    """

    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    example: Inputs
    seed: int = 0
    classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    whole: TaskBatches | None = None

    @property
    def counts(self) -> dict[str, int | None]:
        """How many rows there are of each split; None for a test split that is not there."""
        train, validation = sum(_counts(self.train)), sum(_counts(self.validation))
        test = None
        if self.test is not self.validation:
            test = sum(_counts(self.test))
        return {"train": train, "validation": validation, "test": test}

    def sampled(self) -> DataLoader[Any]:
        """The training rows in one random order, the same in every call and whatever was trained before; as they are,
        not augmented."""
        reader: Any = self.train.collate_fn
        if isinstance(reader, Augmented):
            reader = reader.reader
        return loader(self.train.dataset, reader, self.train.batch_size, self.seed)

    @property
    def size(self) -> int:
        """Rows in a batch of the training rows, about."""
        if self.train.batch_size is not None:
            return self.train.batch_size
        counts = _counts(self.train)
        return max(1, round(sum(counts) / max(1, len(counts))))

    @property
    def example_rows(self) -> int:
        """Rows of the example inputs."""
        return rows_of(self.example) or 1

    def sample(self, rows: int) -> list[Any]:
        """Batches of about so many of these rows: whole batches, and not more than there are."""
        return list(islice(self.sampled(), -(-rows // self.size)))

    def sample_size(self, rows: int) -> int:
        """How many rows `sample` draws."""
        return min(-(-rows // self.size) * self.size, self.counts["train"] or 0)

    def at_most(self, rows: int) -> TaskBatches:
        """The same, with no more rows than so many to choose and to report on, drawn at random; and a word on that."""
        whole = self.whole or self
        remarks = list(whole.remarks)

        def scored(part: DataLoader[Any], name: str) -> DataLoader[Any]:
            count = sum(_counts(part))
            if count <= rows:
                return part
            remarks.append(f"scored on {rows:,} of the {count:,} {name} rows, drawn at random")
            return drawn_rows(part, rows, self.seed)

        validation = test = scored(whole.validation, "validation")
        if whole.test is not whole.validation:
            test = scored(whole.test, "test")
        return replace(whole, validation=validation, test=test, remarks=tuple(remarks), whole=whole)


def _counts(part: DataLoader[Any]) -> list[int]:
    """The rows of each item of a loader's data: one, or those of a batch."""
    data: Any = part.dataset
    if part.batch_size is not None:
        return [1] * len(data)
    counts = []
    for index in range(len(data)):
        counts.append(rows_of(default_inputs_of(data[index])) or 1)
    return counts


def make_batches(
    rows: Rows,
    task: TaskName,
    loaded: LoadedModel,
    options: DataOptions = DataOptions(),
    *,
    augment: bool = False,
    seed: int = 0,
    learns: bool = False,
) -> TaskBatches:
    """The batches of `rows` that a model takes. One of them is tried: what comes later has a model that runs.

    Args:
        rows: as `read_rows` gives them.
        task: what the rows are for.
        loaded: a Transformers model gets mappings, any other model pairs (inputs, labels).
        options: rows in a batch; the longest text, by default what the model has positions for, at most 256, and 512
            for the blocks of a language model; the size of images, by default what the model is known to want.
        augment: shift and mirror the images of the training split at random.
        seed: of the order of the training rows.
        learns: the model is trained on these classes first, so that their order in the alphabet is as good as any.

    Raises:
        DataError: the classes do not fit the model, text has no tokenizer, or what is not images is to be augmented.
        ModelError: the model does not run on the data, or returns something else than the task needs.
    """
    if augment and "image" not in task:
        raise DataError("only images can be augmented (--augment)")
    parts = rows.parts
    reader: Reader
    if "image" in task:
        reader = _image_reader(rows, loaded, options)
    elif task == "causal-lm":
        reader, parts = _language_reader(rows, loaded, options)
    else:
        limit = options.length or _positions(loaded.model, loaded.processor, 256)
        tokenizer = _tokenizer(loaded)
        reader = TextReader(tokenizer, rows.columns.text, rows.columns.label, rows.labels, limit)
    size = options.batch_size
    first = parts["validation"]
    example = default_inputs_of(reader(list(map(first.__getitem__, range(min(size, EXAMPLE, len(first)))))))
    output = first_output(loaded.model, example)
    classes: tuple[str, ...] = ()
    if isinstance(reader, TextReader | ImageReader) and reader.labels is not None:
        own = reader.labels
        if learns:
            own = replace(own, alphabetical=False)
        labels = own.fitted(class_count(output), _class_names(loaded.model))
        reader, classes = replace(reader, labels=labels), labels.names
    validation = test = loader(first, reader, size)
    if parts["test"] is not None:
        test = loader(parts["test"], reader, size)
    moving: Reader = reader
    if augment and isinstance(reader, ImageReader):
        moving = Augmented(reader)
    found = TaskBatches(loader(parts["train"], moving, size, seed), validation, test, example, seed, classes)
    return found.at_most(MOST_SCORED)


def _image_reader(rows: Rows, loaded: LoadedModel, options: DataOptions) -> ImageReader:
    form = ImageFormat.of(loaded.model, options.image_size)
    _check_memory(form, options.batch_size)
    return ImageReader(
        rows.columns.image,
        rows.columns.label,
        rows.labels,
        form,
        loaded.processor,
        _takes_mappings(loaded.model),
        torch.promote_types(loaded.dtype, torch.float32),
    )


def _language_reader(rows: Rows, loaded: LoadedModel, options: DataOptions) -> tuple[TokenReader, dict[str, Any]]:
    """The reader of a language model, and its rows: token numbers as they are, or texts packed into blocks."""
    limit = options.length or _positions(loaded.model, loaded.processor, 512)
    pad = getattr(loaded.processor, "pad_token_id", None) or 0
    mapping, parts = _takes_mappings(loaded.model), rows.parts
    if rows.columns.tokens:
        return TokenReader(rows.columns.tokens, limit, pad, mapping), parts
    tokenizer = _tokenizer(loaded)
    for name, part in parts.items():
        if part is not None:
            parts[name] = packed(part, rows.columns.text[0], tokenizer, limit)
    return TokenReader("input_ids", limit, pad, mapping), parts


def _takes_mappings(model: nn.Module) -> bool:
    """Whether the model is of Transformers, or named as those are."""
    return hasattr(model, "main_input_name")


def _check_memory(form: ImageFormat, batch_size: int) -> None:
    """Raise DataError where one batch of images, and what a model makes of it, is larger than the machine's memory."""
    if form.size is None:
        return
    height, width = form.size
    needed = 4 * batch_size * (form.channels or 3) * height * width
    if 0 < total_bytes() < 4 * needed:
        raise DataError(
            f"a batch of {batch_size} images of {height} x {width} takes {amount(needed)}B, too much of the machine's "
            f"{amount(total_bytes())}B of memory: use smaller images (--image-size) or batches (--batch-size)"
        )


def _tokenizer(loaded: LoadedModel) -> Any:
    if loaded.no_processor:
        raise DataError(loaded.no_processor)
    if loaded.processor is None or not hasattr(loaded.processor, "eos_token_id"):
        raise DataError("text needs the model's tokenizer: save it beside the model, or give rows of input_ids")
    return loaded.processor


def _positions(model: nn.Module, tokenizer: Any | None, most: int) -> int:
    """Tokens a row may have: the model's positions and the tokenizer's limit, at most `most`."""
    config = getattr(model, "config", None)
    limits = [getattr(tokenizer, "model_max_length", None)]
    if config is not None and hasattr(config, "get_text_config"):
        limits.append(getattr(config.get_text_config(), "max_position_embeddings", None))
    for limit in limits:
        if isinstance(limit, int) and limit > 0:
            most = min(most, limit)
    return most


def _class_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(name) for _, name in sorted(names.items()))
