"""Batches of the rows that data.py reads, as a model takes them.

    reader = TextReader(tokenizer, rows.columns.text, rows.columns.label, rows.labels, length=256)
    loader(rows.train, reader, batch_size=32, seed=0)

A reader turns a handful of rows into one batch and is the loader's `collate_fn`, so that text is padded and pictures
are decoded batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shallower.app.data.rows import Labels, Rows
from shallower.app.models import LoadedModel
from shallower.app.options import DataOptions, TaskName
from shallower.app.tasks import IGNORED, class_count, first_output
from shallower.core.inputs import Inputs, default_inputs_of
from shallower.core.memory import total_bytes
from shallower.core.text import amount
from shallower.errors import DataError

Row = Mapping[str, Any]
Reader = Callable[[Sequence[Row]], Any]


@dataclass(frozen=True)
class TextReader:
    """Rows of text and class -> a Transformers batch, padded to its longest row.

    Attributes:
        tokenizer: of the model.
        text: one column, or two for pairs.
        label: the column of the class.
        labels: the classes; None where there are none.
        length: tokens a row at most; longer ones are cut.
    """

    tokenizer: Callable[..., Any]
    text: tuple[str, ...]
    label: str
    labels: Labels | None
    length: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask (rows, tokens) and labels (rows,), if there are any."""
        texts = (_column(rows, name) for name in self.text)
        encoded = self.tokenizer(*texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        if self.labels is None:
            return dict(encoded)
        return {**encoded, "labels": _class_numbers(rows, self.label, self.labels)}


def _column(rows: Iterable[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _class_numbers(rows: Sequence[Row], column: str, labels: Labels) -> Tensor:
    return torch.tensor(list(map(labels, _column(rows, column))))


@dataclass(frozen=True)
class TokenReader:
    """Rows of token numbers -> a batch for a language model, padded at the end.

    Attributes:
        column: of the token numbers.
        length: tokens a row at most; longer ones are cut.
        pad: the token that fills shorter rows; no position there counts.
        mapping: whether the model takes a Transformers batch, not the token numbers as its one argument.
    """

    column: str
    length: int
    pad: int = 0
    mapping: bool = True

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """input_ids, attention_mask and labels, each (rows, tokens); labels are -100 where a row is padded."""
        tokens = [torch.as_tensor(numbers[: self.length]) for numbers in _column(rows, self.column)]
        lengths = torch.tensor(list(map(len, tokens)))
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~mask, IGNORED)
        if not self.mapping:
            return ids, labels
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@dataclass(frozen=True)
class ImageFormat:
    """What a model wants its pictures to look like.

    Attributes:
        channels: 1 for grey, 3 for colour, None for what the picture has.
        size: (height, width), or None to leave the pictures as they are.
        crop: pictures are resized so that this part of them, cut out of the middle, fills `size`.
        mean, std: of each channel, of pixels between 0 and 1; for another number of channels 0.5.
        interpolation: "bilinear" or "bicubic".
    """

    channels: int | None = 3
    size: tuple[int, int] | None = None
    crop: float = 1.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, model: nn.Module, size: int | None = None) -> ImageFormat:
        """What is known about a model's pictures: timm's configuration, a fixed `image_size`, its first convolution.

        Where nothing is known: pictures of their own size, those in colour with ImageNet's mean and standard deviation.
        """
        config: Any = getattr(model, "pretrained_cfg", None)
        if not isinstance(config, Mapping):
            config = {}
        channels, *usual = config.get("input_size") or (None,)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                channels = module.in_channels
                break
        crop, fixed = 1.0, _fixed_size(model)
        if size:
            fixed = (size,)
        elif not fixed:
            crop, fixed = float(config.get("crop_pct") or 1), tuple(usual)
        found = cls(channels, None, crop, tuple(config.get("mean") or cls.mean), tuple(config.get("std") or cls.std))
        if fixed:
            found = replace(found, size=(int(fixed[0]), int(fixed[-1])))
        if config.get("interpolation") == "bicubic":
            found = replace(found, interpolation="bicubic")
        return found

    def __call__(self, picture: Any) -> Tensor:
        """One picture, of Pillow or an array, as (channels, height, width) float32.

        An array of numbers that is no picture (one dimension) is returned as it is.

        Raises:
            DataError: the array has other channels than the model.
        """
        if hasattr(picture, "convert"):
            mode = "RGB"
            if self.channels == 1 or (self.channels is None and picture.mode in ("1", "L")):
                mode = "L"
            picture = picture.convert(mode)
        array = np.asarray(picture)
        pixels = torch.from_numpy(array.astype(np.float32))
        if array.dtype == np.uint8:
            pixels = pixels / 255
        if pixels.ndim < 2:
            return pixels
        wanted: tuple[int, ...] = (1, 3)
        if self.channels is not None:
            wanted = (self.channels,)
        if pixels.ndim == 2:
            pixels = pixels[None]
        elif pixels.shape[0] not in wanted and pixels.shape[-1] in wanted:
            pixels = pixels.permute(2, 0, 1)
        if pixels.ndim != 3 or pixels.shape[0] not in wanted:
            channels = " or ".join(map(str, wanted))
            raise DataError(f"a picture of shape {array.shape} does not fit a model with {channels} channels")
        if self.size is not None and tuple(pixels.shape[1:]) != self.size:
            pixels = self._resized(pixels, self.size)
        if array.dtype != np.uint8:
            return pixels.contiguous()
        known = torch.full((2, len(pixels)), 0.5)
        if len(self.mean) == len(pixels):
            known = torch.tensor([self.mean, self.std])
        mean, std = known[0], known[1]
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def _resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = pixels.shape[1:]
        scale = max(size[0] / height, size[1] / width) / self.crop
        whole = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        if whole != (height, width):
            pixels = F.interpolate(pixels[None], whole, mode=self.interpolation, antialias=True)[0].clamp(
                pixels.min(), pixels.max()
            )
        top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
        return pixels[:, top : top + size[0], left : left + size[1]]


@dataclass(frozen=True)
class ImageReader:
    """Rows of picture and class -> a batch.

    Attributes:
        image: column of the picture.
        label: column of the class.
        labels: the classes; None where there are none.
        format: how a picture becomes a tensor.
        processor: a Transformers image processor, which then takes the place of `format`.
        mapping: whether the model takes a Transformers batch, not the pictures as its one argument.
        dtype: of the pictures, where that is not float32.
    """

    image: str
    label: str
    labels: Labels | None
    format: ImageFormat = ImageFormat()
    processor: Callable[..., Any] | None = None
    mapping: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor] | tuple[Tensor, Tensor] | Tensor:
        """pixel_values (rows, channels, height, width) and labels (rows,), if there are any.

        Raises:
            DataError: the pictures differ in size, and nothing says which one the model wants; or a number in them is
                not finite.
        """
        values = self._pixels(_column(rows, self.image)).to(self.dtype)
        if not bool(values.isfinite().all()):
            raise DataError(f"column {self.image!r} holds numbers that are not finite (NaN or inf): remove those rows")
        if self.labels is None:
            return {"pixel_values": values} if self.mapping else values
        labels = _class_numbers(rows, self.label, self.labels)
        return {"pixel_values": values, "labels": labels} if self.mapping else (values, labels)

    def _pixels(self, pictures: Sequence[Any]) -> Tensor:
        if self.processor is not None:
            coloured = list(map(_coloured, pictures))
            found: Tensor = self.processor(images=coloured, return_tensors="pt")["pixel_values"]
            return found
        tensors = list(map(self.format, pictures))
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise DataError(f"the pictures have sizes such as {shapes[0]} and {shapes[-1]}: give one --image-size")
        return torch.stack(tensors)


def _coloured(picture: Any) -> Any:
    """A picture of Pillow in three colours; an array as it is."""
    if hasattr(picture, "convert"):
        return picture.convert("RGB")
    return picture


@dataclass(frozen=True)
class Augmented:
    """A reader of pictures whose batches are moved by up to an eighth of their size and mirrored at random.

    Attributes:
        reader: of the pictures.
        flip: mirror half of them, left to right.
    """

    reader: ImageReader
    flip: bool = True

    def __call__(self, rows: Sequence[Row]) -> Any:
        """As the reader gives it, other pixels."""
        batch = self.reader(rows)
        if isinstance(batch, Mapping):
            return {**batch, "pixel_values": self._moved(batch["pixel_values"])}
        if isinstance(batch, Tensor):
            return self._moved(batch)
        return (self._moved(batch[0]), *batch[1:])

    def _moved(self, pictures: Tensor) -> Tensor:
        """Crops of the same size out of (rows, channels, height, width) pictures with a border of zeros."""
        rows, _, height, width = pictures.shape
        border = max(height, width) // 8
        padded = F.pad(pictures, (border,) * 4)
        corners = torch.randint(2 * border + 1, (2, rows)).T.tolist()
        mirrored = torch.rand(rows) < 0.5
        moved = torch.empty_like(pictures)
        for i, (top, left) in enumerate(corners):
            moved[i] = padded[i, :, top : top + height, left : left + width]
            if self.flip and mirrored[i]:
                moved[i] = moved[i].flip(-1)
        return moved


def packed(rows: Iterable[Row], column: str, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """The texts of a column as token numbers, one after another, cut into blocks of equal length.

    An end-of-text token, where the tokenizer has one, stands between two texts. The last block may be shorter.

    Raises:
        DataError: there are fewer than two tokens.
    """
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    texts = list(filter(str.strip, _column(rows, column)))
    if texts:
        for encoded in tokenizer(texts)["input_ids"]:
            tokens += encoded
            if end is not None and encoded[-1:] != [end]:
                tokens.append(end)
    # One token alone predicts nothing.
    blocks = [{"input_ids": tokens[start : start + length]} for start in range(0, len(tokens) - 1, length)]
    if not blocks:
        raise DataError(f"column {column!r} holds fewer than two tokens of text")
    return blocks


def loader(rows: Any, reader: Reader, batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    """A loader of the batches that `reader` makes of `rows`; with a seed, shuffled anew in each pass."""
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch_size=batch_size, shuffle=seed is not None, generator=generator, collate_fn=reader)


@dataclass(frozen=True)
class TaskBatches:
    """What a model is trained, validated and tested on.

    Attributes:
        train: shuffled anew in each pass.
        validation: to choose on.
        test: to report on; `validation` where the data has no test split.
        example: the model's inputs of the first batch of `validation`.
        seed: of the rows that `sampled` draws.
        classes: names of the classes, where they have some.
    """

    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    example: Inputs
    seed: int = 0
    classes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int | None]:
        """How many rows there are of each split; None for a test split that is not there."""
        train, validation, test = map(_row_count, (self.train, self.validation, self.test))
        counts = {"train": train, "validation": validation, "test": test}
        if self.test is self.validation:
            return {**counts, "test": None}
        return dict(counts)

    def sampled(self) -> DataLoader[Any]:
        """The training rows in one random order, the same in every call and whatever was trained before; as they are,
        not augmented."""
        reader: Any = self.train.collate_fn
        if isinstance(reader, Augmented):
            reader = reader.reader
        return loader(self.train.dataset, reader, self.train.batch_size or 1, self.seed)


def make_batches(
    rows: Rows,
    task: TaskName,
    loaded: LoadedModel,
    options: DataOptions = DataOptions(),
    *,
    augment: bool = False,
    seed: int = 0,
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
    example = default_inputs_of(reader(list(map(first.__getitem__, range(min(size, len(first)))))))
    output = first_output(loaded.model, example)
    classes: tuple[str, ...] = ()
    if isinstance(reader, TextReader | ImageReader) and reader.labels is not None:
        labels = reader.labels.fitted(class_count(output), _class_names(loaded.model))
        reader, classes = replace(reader, labels=labels), labels.names
    validation = test = loader(first, reader, size)
    if parts["test"] is not None:
        test = loader(parts["test"], reader, size)
    moving: Reader = reader
    if augment and isinstance(reader, ImageReader):
        moving = Augmented(reader)
    return TaskBatches(loader(parts["train"], moving, size, seed), validation, test, example, seed, classes)


def _row_count(part: DataLoader[Any]) -> int:
    rows: Any = part.dataset
    return len(rows)


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


def _fixed_size(model: nn.Module) -> tuple[int, ...]:
    """The picture size that a model was built for, where it has an attribute that says so."""
    owners = (getattr(model, "config", None), model, getattr(model, "patch_embed", None))
    for owner, name in product(owners, ("image_size", "img_size")):
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return (size,)
        if isinstance(size, (tuple, list)) and list(map(type, size)) == [int, int]:
            return tuple(size)
    return ()
