"""Rows of the data -> batches as a model takes them: text, token numbers, pictures.

    reader = TextReader(tokenizer, ("text",), "label", labels, length=256)
    reader(rows[:32])

A reader turns a handful of rows into one batch and is a loader's `collate_fn`, so that text is padded and pictures
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

from shallower.app.data.rows import Labels
from shallower.app.tasks import IGNORED
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
