"""Two models' outputs for a batch, row by row.

for row in compared_rows(small(x), model(x), mask, row_digests(batch), classes=True):
    row.changed, row.positions
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shallower.errors import ModelError
from shallower.training.divergence import kl_at_positions


@dataclass(frozen=True)
class ComparedRow:
    """How far one row's outputs are from one another.

    Attributes:
        digest: of the row's content.
        positions: answers that count in it; 1 where it has one, or none.
        changed: of these, how many differ.
        sampled: whether the answer at the position that was drawn differs.
        error: Kullback-Leibler divergence, summed over positions; of features the squared error.
        size: what the error is divided by: the positions; of features their squared size.
        cosine: of features.
        several: whether a row has several answers.
    """

    digest: str
    positions: int
    changed: int
    sampled: bool
    error: float
    size: float
    cosine: float = 1.0
    several: bool = False


def compared_rows(
    given: Tensor, wanted: Tensor, mask: Tensor | None, digests: Sequence[str], *, classes: bool, seed: int = 0
) -> Iterator[ComparedRow]:
    """Rows of two outputs for one batch; a row in which nothing counts is left out.

        rows = list(compared_rows(small(x), model(x), None, row_digests(batch), classes=True))

    Args:
        given, wanted: the small model's output and the original's, a row in dimension 0. Classes are in the last
            dimension, or, of maps (rows, classes, height, width), in dimension 1.
        mask: of the positions that count, (rows, positions); ignored where the output has others.
        digests: one for each row.
        classes: whether they are logits of classes, not features.
        seed: of the position that is drawn; it depends on this and on the row's content alone.

    Raises:
        ModelError: the outputs have different shapes, are not one for each row, or hold numbers that are not finite.
    """
    if given.shape != wanted.shape or given.dim() == 0 or len(given) != len(digests):
        raise ModelError(
            f"the models return {tuple(given.shape)} and {tuple(wanted.shape)} for a batch of {len(digests)} rows, and "
            "rows are compared one by one: say with output_of= which output has a row for each input"
        )
    if not bool(given.isfinite().any()) or bool(given.isnan().any()) or bool(wanted.isnan().any()):
        raise ModelError("a model returns numbers that are not finite (NaN or inf) for these batches")
    if classes:
        return _answers(given, wanted, mask, digests, seed)
    return _of_features(given, wanted, mask, digests)


def _answers(
    given: Tensor, wanted: Tensor, mask: Tensor | None, digests: Sequence[str], seed: int
) -> Iterator[ComparedRow]:
    if given.dim() > 3:
        given, wanted = given.movedim(1, -1), wanted.movedim(1, -1)
    several = given.dim() > 2
    differ = given.argmax(-1) != wanted.argmax(-1)
    error = kl_at_positions(given, wanted)
    count = torch.ones_like(differ)
    if mask is not None and mask.shape == differ.shape:
        count = mask.to(differ.device).bool()
    for digest, d, e, c in zip(digests, differ.cpu(), error.double().cpu(), count.cpu(), strict=True):
        changed = d[c].flatten().tolist()
        if changed:
            # a generator of its own, from the content: whatever stands beside the row, the same position is drawn
            sampled = random.Random(f"{seed}:{digest}").choice(changed)
            yield ComparedRow(
                digest, len(changed), sum(changed), sampled, float(e[c].sum()), len(changed), several=several
            )


def _of_features(given: Tensor, wanted: Tensor, mask: Tensor | None, digests: Sequence[str]) -> Iterator[ComparedRow]:
    given, wanted = given.detach().cpu().double(), wanted.detach().cpu().double()
    for index, digest in enumerate(digests):
        a, b = given[index], wanted[index]
        if mask is not None and mask.shape == given.shape[: mask.dim()]:
            kept = mask[index].cpu().bool()
            a, b = a[kept], b[kept]
        if a.numel():
            a, b = a.flatten(), b.flatten()
            error, size = float((a - b).square().sum()), float(b.square().sum())
            yield ComparedRow(digest, 1, 0, False, error, size, float(F.cosine_similarity(a, b, dim=0)))
