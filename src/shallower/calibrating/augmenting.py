"""More token batches out of the same ones: calibration on a few hundred sentences that holds on other text.

    batches = sh.augment_tokens(batches, vocabulary=range(1000, 30522))
    plan = sh.squeeze(model, sites, batches, "macs:60%")

A few hundred sentences hold few of a vocabulary's tokens, and lengths of one kind. What is fitted to them holds for
text like them; rearranged they show the network more of what it may meet, and no other text is needed. That the result
makes no sense matters little: a layer is fitted to what the trained network does with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shallower.core.inputs import default_inputs_of, default_mask_of
from shallower.errors import FitError

TokenBatch = dict[str, Tensor]
"""input_ids and attention_mask, and token_type_ids where they were given: (rows, tokens) int64."""

TokenRow = list[int]

_SEGMENTS = "token_type_ids"
_KEYS = frozenset({"input_ids", "attention_mask", _SEGMENTS})


def augment_tokens(
    batches: Iterable[Any],
    *,
    vocabulary: Sequence[int] | None = None,
    replaced: float = 0.15,
    joined: int = 2,
    longest: int | None = None,
    seed: int = 0,
) -> list[TokenBatch]:
    """The batches as they are, and four times as many tokens in other arrangements.

        more = sh.augment_tokens(batches, vocabulary=range(1000, 30522))

    Joined to longer rows; with a part of the tokens replaced by others; joined and replaced; and so with twice as many
    joined. Tokens that begin or end every row, such as [CLS] and [SEP], stay where they are.

    Args:
        batches: mappings of `input_ids` (rows, tokens) and, where rows are padded, `attention_mask`;
            `token_type_ids` may be there if they are 0, and labels, which are left out.
        vocabulary: tokens that others are replaced by, without special ones; by default those of the batches.
        replaced: the share of tokens that are replaced.
        joined: how many rows become one.
        longest: tokens of a joined row at most; by default 128, or those of the longest row given, if it has more.
        seed: random seed.

    Raises:
        FitError: there are no batches, batches of another kind, or an option is out of range.
    """
    if not 0 <= replaced <= 1 or joined < 1:
        raise FitError("replaced must be from 0 to 1, and joined at least 1")
    given = list(map(_inputs_of, batches))
    rows = list(chain.from_iterable(map(_rows_without_padding, given)))
    if not rows:
        raise FitError("augmenting needs data: `batches` is empty. Give a few hundred samples")
    before, after = _frame(rows)
    inner = []
    for row in rows:
        inner.append(row[len(before) : len(row) - len(after)])
    # the tokens of the frame are put around a joined row again, once
    room = (longest or max(128, *map(len, rows))) - len(before) - len(after)
    tokens = vocabulary or list(chain.from_iterable(inner))
    if not any(inner) or not tokens:
        raise FitError("the rows hold no tokens that could be replaced or joined")
    mixing = _Mixing(random.Random(seed), tokens, replaced, max(1, room))
    size = max(len(batch["input_ids"]) for batch in given)
    found: list[TokenBatch] = []
    for batch in given:
        found.append({"input_ids": batch["input_ids"], "attention_mask": _mask_or_ones(batch)})
    for arranged in (
        mixing.joined(inner, joined),
        mixing.mixed(inner),
        mixing.mixed(mixing.joined(inner, joined)),
        mixing.mixed(mixing.joined(inner, 2 * joined)),
    ):
        found += _padded_batches(arranged, before, after, size)
    if any(_SEGMENTS in batch for batch in given):
        for batch in found:
            batch[_SEGMENTS] = torch.zeros_like(batch["input_ids"])
    return found


@dataclass
class _Mixing:
    """Rearranges rows.

    Attributes:
        draw: random numbers.
        tokens: that others are replaced by.
        replaced: the share of tokens that are replaced.
        room: tokens of a joined row at most.
    """

    draw: random.Random
    tokens: Sequence[int]
    replaced: float
    room: int

    def mixed(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """Some tokens of each row replaced."""
        found = []
        for row in rows:
            other = list(row)
            for i in range(len(row)):
                if self.draw.random() < self.replaced:
                    other[i] = self.draw.choice(self.tokens)
            found.append(other)
        return found

    def joined(self, rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
        """So many rows at a time in one, in random order."""
        order = self.draw.sample(rows, len(rows))
        found = []
        for i in range(0, len(order), count):
            found.append(list(chain.from_iterable(order[i : i + count]))[: self.room])
        return found


def _inputs_of(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return default_inputs_of(batch)
    return batch


def _rows_without_padding(batch: Any) -> Iterator[TokenRow]:
    """The rows of a batch.

    Raises:
        FitError: the batch is not of this kind.
    """
    ids = None
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or set(batch) - _KEYS:
        raise FitError(
            "only batches of tokens can be augmented: mappings of `input_ids` (rows, tokens), `attention_mask` and "
            "`token_type_ids`, and nothing else"
        )
    if _SEGMENTS in batch and bool(batch[_SEGMENTS].any()):
        raise FitError(
            "batches of pairs of texts (`token_type_ids` other than 0) cannot be augmented: pass single texts"
        )
    for row, mask in zip(ids, _mask_or_ones(batch), strict=True):
        yield row[mask.bool()].tolist()


def _mask_or_ones(batch: TokenBatch) -> Tensor:
    mask = default_mask_of(batch)
    if mask is None:
        return torch.ones_like(batch["input_ids"])
    return mask


def _frame(rows: Sequence[TokenRow]) -> tuple[TokenRow, TokenRow]:
    """The token that begins all rows and the one that ends them, where there is such a one."""
    if len(rows) < 2 or min(map(len, rows)) < 3:
        return [], []
    before, after = rows[0][:1], rows[0][-1:]
    for row in rows:
        if row[:1] != before:
            before = []
        if row[-1:] != after:
            after = []
    return before, after


def _padded_batches(rows: Sequence[TokenRow], before: TokenRow, after: TokenRow, size: int) -> Iterator[TokenBatch]:
    """Rows of like length together, padded at the end."""
    whole = []
    for row in rows:
        if before or row or after:
            whole.append(torch.tensor([*before, *row, *after]))
    whole.sort(key=len)
    for start in range(0, len(whole), size):
        part = whole[start : start + size]
        ids = pad_sequence(part, batch_first=True)
        mask = pad_sequence(list(map(torch.ones_like, part)), batch_first=True)
        yield {"input_ids": ids, "attention_mask": mask}


def varied(batches: Iterable[Any], **options: Any) -> list[TokenBatch]:
    """The earlier name of `augment_tokens`.

        more = sh.varied(batches, vocabulary=range(1000, 30522))

    The options are those of `augment_tokens`.
    """
    return augment_tokens(batches, **options)
