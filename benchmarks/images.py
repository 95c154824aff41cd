"""CIFAR-10 as tensors: read once, cached, cropped and flipped at random while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.record import required

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Images:
    """Images (n, 3, 32, 32) of bytes and their labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


def cifar10(data: Path, split: str, cache: Path) -> Images:
    """The train (15,000 rows) or test (10,000 rows) images in `data`/cifar10, decoded once into `cache`."""
    decoded = cache / f"cifar10-{split}.safetensors"
    if not decoded.exists():
        path = str(required(data / "cifar10" / f"{split}.parquet"))
        from datasets import load_dataset

        rows = load_dataset("parquet", data_files={split: path}, split=split, cache_dir=str(cache / "datasets"))
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
        cache.mkdir(parents=True, exist_ok=True)
        partial = decoded.with_suffix(".partial")
        save_file(
            {
                "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
                "labels": torch.tensor(rows["label"]),
            },
            partial,
        )
        partial.replace(decoded)
    tensors = load_file(decoded)
    return Images(tensors["pixels"], tensors["labels"])


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as the network wants them: channels of mean 0 and deviation 1 over the training set."""
    return (pixels.float() / 255 - MEAN) / STD


class Batches:
    """Training batches (images, labels) in a new order each epoch, cropped after a padding of 4 and flipped at random.

    All randomness is torch's global generator's, so that a run can be repeated and resumed. What does not fill a
    batch is left out of the epoch.
    """

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for number in range(len(self)):
            rows = order[number * self.size : (number + 1) * self.size]
            yield normalised(cropped_and_flipped(self.images.pixels[rows])), self.images.labels[rows]


def cropped_and_flipped(pixels: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by up to `padding` pixels, black beyond the border, half of them mirrored."""
    n, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, (padding,) * 4)
    down = torch.randint(0, 2 * padding + 1, (n, 1)) + torch.arange(height)
    right = torch.randint(0, 2 * padding + 1, (n, 1)) + torch.arange(width)
    right = torch.where(torch.rand(n, 1) < 0.5, right, right.flip(1))
    image, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    return padded[image, channel, down.view(n, 1, height, 1), right.view(n, 1, 1, width)]


def accuracy(model: nn.Module, images: Images, size: int = 250) -> float:
    """Share of `images` that the model classifies rightly, in eval mode and the model's own precision."""
    training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), size):
            part = images[start : start + size]
            right += int((model(normalised(part.pixels)).argmax(1) == part.labels).sum())
    model.train(training)
    return right / len(images)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch (images, labels)."""
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])
