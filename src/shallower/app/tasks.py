"""What a task means: the loss that trains a model, the score that judges it, and how the score is shown.

A batch is a mapping with `labels` (a Transformers batch), or a pair (inputs, labels). Where there are no labels, a
smaller model can still be judged by its likeness to the original (`Likeness`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from shallower.app.failures import one_line
from shallower.app.options import TASK_NAMES
from shallower.app.quality import shown
from shallower.core.inputs import Inputs, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.text import listing
from shallower.core.trees import tensors, to_device
from shallower.errors import DataError, ForwardError, ModelError

IGNORED = -100
"""The label of a position that counts for nothing."""


class Task(Protocol):
    """What training, choosing and reporting need to know about a task."""

    quality: str
    """What `show` shows: "accuracy", "perplexity"."""
    labelled: bool
    """Whether there is a loss to train on."""
    features: bool
    """Whether the answers are features, not logits."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of one batch, a scalar."""

    def score(self, model: nn.Module, batches: Iterable[Any], *, label: str = "") -> float:
        """How good the model is on all batches, higher is better; `label` names a progress bar."""

    def show(self, score: float) -> str:
        """The score for people."""

    def score_of(self, quality: float) -> float:
        """The score of a quality as people say it: an accuracy of 0.9, a perplexity of 20."""

    def chance(self, original: nn.Module, batches: Iterable[Any]) -> float:
        """The score that answering always the same gives on these batches; 0 where that means nothing."""


class Classification:
    """One class for each input: cross-entropy, judged by accuracy."""

    quality = "accuracy"
    labelled, features = True, False

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean cross-entropy of (rows, classes) logits."""
        logits, labels = _answer(model, batch)
        return F.cross_entropy(logits.float(), labels)

    def score(self, model: nn.Module, batches: Iterable[Any], *, label: str = "") -> float:
        """The part of the inputs, 0 to 1, whose largest logit is that of the label."""
        right = rows = 0
        with evaluating(model):
            for batch in _progress(batches, label):
                logits, labels = _answer(model, batch)
                right += int((logits.argmax(-1) == labels).sum())
                rows += len(labels)
        if not rows:
            raise DataError("there are no rows to score the model on")
        return right / rows

    def show(self, score: float) -> str:
        """93.40 %."""
        return shown(self.quality, score)

    def score_of(self, quality: float) -> float:
        """The accuracy itself, 0 to 1.

        Raises:
            DataError: it is not within 0 and 1.
        """
        if not 0 <= quality <= 1:
            raise DataError(f"an accuracy lies between 0 and 1, not at {quality:g}")
        return quality

    def chance(self, original: nn.Module, batches: Iterable[Any]) -> float:  # noqa: ARG002 - labels say it
        """The share of the most frequent class."""
        return _largest_share(torch.cat([labels_of(batch).flatten() for batch in batches]))


class LanguageModelling:
    """The next token: cross-entropy, judged by the mean loss of a token and shown as perplexity."""

    quality = "perplexity"
    labelled, features = True, False

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean cross-entropy over the tokens that are predicted; labels of -100 count for nothing."""
        total, tokens = self._token_losses(model, batch)
        return total / tokens.clamp(min=1)

    def score(self, model: nn.Module, batches: Iterable[Any], *, label: str = "") -> float:
        """Minus the summed loss of all tokens over their number."""
        total, tokens = 0.0, 0
        with evaluating(model):
            for batch in _progress(batches, label):
                losses, count = self._token_losses(model, batch)
                total += float(losses)
                tokens += int(count)
        if not tokens:
            raise DataError("there are no tokens to score the model on")
        return -total / tokens

    def show(self, score: float) -> str:
        """exp(-score), the perplexity."""
        return shown(self.quality, score)

    def score_of(self, quality: float) -> float:
        """Minus the logarithm of a perplexity.

        Raises:
            DataError: it is below 1.
        """
        if quality < 1:
            raise DataError(f"a perplexity is at least 1, not {quality:g}")
        return -math.log(quality)

    def chance(self, original: nn.Module, batches: Iterable[Any]) -> float:  # noqa: ARG002
        """Nothing: a perplexity is compared with the original's."""
        return 0.0

    def _token_losses(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = _answer(model, batch)
        targets = labels[:, 1:].reshape(-1)
        losses = F.cross_entropy(
            logits[:, :-1].float().reshape(len(targets), -1), targets, ignore_index=IGNORED, reduction="sum"
        )
        return losses, (targets != IGNORED).sum()


class Likeness:
    """How like the original a model answers, for rows without labels; `to(original)` makes the task.

    Of classifiers it is the part of the rows on which both give the same class ("agreement"). Of everything else it is
    the mean cosine of the two models' features of a row, both less the original's mean over the rows, so that what
    all rows have in common counts for nothing ("cosine"); tokens are averaged over the attention mask.

    Args:
        features: whether the answer is features, not logits.
        original: the model to be like.
    """

    labelled = False

    def __init__(self, features: bool, original: nn.Module | None = None) -> None:
        self.features = features
        self.original = original
        self.quality = "cosine" if features else "agreement"

    def to(self, original: nn.Module) -> Likeness:
        """This task, with the model to be like."""
        return Likeness(self.features, original)

    def loss(self, _model: nn.Module, _batch: Any) -> Tensor:
        """Not available.

        Raises:
            DataError: always: without labels there is nothing to train on.
        """
        raise DataError(
            "the data has no labels, and this trains on them: name their column (--label-column), or squeeze without "
            "training (--method squeeze)"
        )

    def score(self, model: nn.Module, batches: Iterable[Any], *, label: str = "") -> float:
        """1 where the models answer alike on all batches.

        Raises:
            DataError: there are no rows.
        """
        original = self.original
        if original is None or original is model:
            return 1.0
        pairs = []
        with evaluating(model), evaluating(original):
            for batch in _progress(batches, label):
                pairs.append((self._answer(original, batch), self._answer(model, batch)))
        if not pairs:
            raise DataError("there are no rows to score the model on")
        there, here = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if not self.features:
            return float((there == here).double().mean())
        mean = there.mean(0)
        return float(F.cosine_similarity(there - mean, here - mean, dim=-1).mean())

    def show(self, score: float) -> str:
        """98.50 %, or a cosine of 0.9850."""
        return shown(self.quality, score)

    def score_of(self, quality: float) -> float:
        """The agreement or the cosine itself.

        Raises:
            DataError: it is not within 0 and 1.
        """
        if not 0 <= quality <= 1:
            raise DataError(f"the {self.quality} lies between 0 and 1, not at {quality:g}")
        return quality

    def chance(self, original: nn.Module, batches: Iterable[Any]) -> float:
        """The share of the original's most frequent answer; of features 0."""
        if self.features:
            return 0.0
        with evaluating(original):
            return _largest_share(torch.cat([self._answer(original, batch) for batch in batches]))

    def _answer(self, model: nn.Module, batch: Any) -> Tensor:
        """(rows,) classes, or (rows, d) features in float64, on the CPU."""
        inputs = default_inputs_of(batch)
        output = call(model, to_device(inputs, model_device(model)))
        if not self.features:
            return logits_of(output).argmax(-1).cpu()
        return _features(output, inputs.get("attention_mask") if isinstance(inputs, Mapping) else None)


def _largest_share(values: Tensor) -> float:
    return float(values.unique(return_counts=True)[1].max()) / len(values)  # type: ignore[no-untyped-call]


def _features(output: Any, mask: Tensor | None) -> Tensor:
    """One row of float64 features for each input: what is in between (tokens) is averaged."""
    found = next((part for part in tensors(output) if part.is_floating_point() and part.dim() > 1), None)
    if found is None:
        raise ModelError(f"the model answers with a {type(output).__name__} that holds no features")
    features = found.cpu().double()
    if features.dim() == 3 and mask is not None and mask.shape == features.shape[:2]:
        weights = mask.cpu().double()[..., None]
        return (features * weights).sum(1) / weights.sum(1).clamp(min=1)
    return features.mean(1) if features.dim() == 3 else features.flatten(1)


def task_named(name: str, labelled: bool = True) -> Task:
    """The task of that name.

    Args:
        name: one of `TASK_NAMES`.
        labelled: whether the data has labels; without them, classifiers are judged by their likeness to the original.

    Raises:
        DataError: there is none; the error lists them.
    """
    if name in ("feature-extraction", "image-feature-extraction"):
        return Likeness(features=True)
    if name in TASK_NAMES and name != "causal-lm" and not labelled:
        return Likeness(features=False)
    if name == "causal-lm":
        return LanguageModelling()
    if name in TASK_NAMES:
        return Classification()
    raise DataError(f"there is no task {name!r}; the tasks are {', '.join(TASK_NAMES)}")


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: `labels` of a mapping, the second of a pair.

    Raises:
        DataError: the batch has none.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise DataError(f"a {type(batch).__name__} is not a batch with labels: give {{..., 'labels': ...}} or a pair")
    return labels


def logits_of(output: Any) -> Tensor:
    """The logits in what a model answers: the tensor itself, `.logits`, `["logits"]` or the first of a tuple.

    Raises:
        ModelError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ModelError(f"the model answers with a {type(output).__name__} that holds no logits: has it a head?")
    return found


def first_output(model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns for its first batch. It is the user's code that runs here, and nothing is known of it.

    Raises:
        ModelError: the model fails on these inputs, or returns numbers that are not finite.
    """
    try:
        with evaluating(model):
            output = call(model, to_device(inputs, model_device(model)))
    except (ForwardError, SystemExit) as error:
        cause = error.__cause__ or error
        shapes = listing(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors(inputs))
        raise ModelError(f"the model does not run on the data ({shapes}): {one_line(cause)}") from error
    if not all(bool(part.isfinite().all()) for part in tensors(output)):
        raise ModelError("the model returns numbers that are not finite (NaN or inf) for the data")
    return output


def class_count(output: Any) -> int:
    """How many classes the logits in an output are of.

    Raises:
        ModelError: they have not one row for each input.
    """
    logits = logits_of(output)
    if logits.dim() != 2:
        raise ModelError(
            f"the model returns a tensor of shape {tuple(logits.shape)}, and classes need one row of logits for each "
            "input: (rows, classes)"
        )
    return logits.shape[1]


def _answer(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    device = model_device(model)
    inputs, labels = default_inputs_of(batch), labels_of(batch)
    return logits_of(call(model, to_device(inputs, device))), labels.to(device)


def _progress(batches: Iterable[Any], label: str) -> Iterable[Any]:
    return tqdm(batches, desc=label, leave=False, disable=None) if label else batches
