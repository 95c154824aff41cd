"""More token batches out of the same ones: calibration on a few hundred sentences that holds on other text.

    batches = varied(batches, vocabulary=range(1000, 30522))
    plan = squeeze(model, sites, batches, "macs:60%")

A few hundred sentences hold few of a vocabulary's tokens, and lengths of one kind. What is fitted to them holds for
text like them; rearranged they show the network more of what it may meet, and no other text is needed. That the result
makes no sense matters little: a layer is fitted to what the trained network does with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shallower.core.inputs import default_inputs_of, default_mask_of
from shallower.errors import FitError

TokenBatch = dict[str, Tensor]
"""input_ids and attention_mask, and token_type_ids where they were given: (rows, tokens) int64."""

_Row = list[int]


def varied(
    batches: Iterable[Any],
    *,
    vocabulary: Sequence[int] | None = None,
    replaced: float = 0.15,
    joined: int = 2,
    longest: int | None = None,
    seed: int = 0,
) -> list[TokenBatch]:
    """The batches as they are, and four times as many tokens in other arrangements.

    Joined to longer rows; with a part of the tokens replaced by others; joined and replaced; and so with twice as many
    joined. Tokens that begin or end every row, such as [CLS] and [SEP], stay where they are.

    Args:
        batches: mappings of `input_ids` (rows, tokens) and, where rows are padded, `attention_mask`;
            `token_type_ids` may be there if they are 0, and labels, which are left out.
        vocabulary: tokens that others are replaced by, without special ones; by default those of the batches.
        replaced: which part of the tokens.
        joined: how many rows become one.
        longest: tokens of a joined row at most; by default 128, or those of the longest row given, if it has more.
        seed: of what is drawn.

    Raises:
        FitError: there are no batches, or batches of another kind.
    """
    given: list[Any] = [default_inputs_of(batch) if isinstance(batch, Mapping) else batch for batch in batches]
    rows = [row for batch in given for row in _rows(batch)]
    if not rows:
        raise FitError("no batches to vary; give a few hundred samples")
    if not 0 <= replaced <= 1 or joined < 1:
        raise FitError("replaced is a part from 0 to 1, and joined at least 1")
    before, after = _frame(rows)
    room = (longest or max(128, *map(len, rows))) - len(before) - len(after)
    inner = [row[len(before) : len(row) - len(after)] for row in rows]
    draw = random.Random(seed)
    seen = [token for row in inner for token in row]
    others = seen if vocabulary is None else list(vocabulary)
    if not seen or not others:
        raise FitError("no tokens to vary")

    def mixed(row: _Row) -> _Row:
        return [draw.choice(others) if draw.random() < replaced else token for token in row]

    def united(count: int) -> list[_Row]:
        order = draw.sample(inner, len(inner))
        groups = [order[i : i + count] for i in range(0, len(order), count)]
        return [[t for row in group for t in row][: max(1, room)] for group in groups]

    ways = [
        united(joined),
        [mixed(row) for row in inner],
        [mixed(row) for row in united(joined)],
        [mixed(row) for row in united(2 * joined)],
    ]
    size = max(len(batch["input_ids"]) for batch in given)
    found: list[TokenBatch] = []
    for way in ways:
        found += _batches([[*before, *row, *after] for row in way], size)
    whole = [{"input_ids": b["input_ids"], "attention_mask": _mask(b)} for b in given] + found
    if any(_TYPES in batch for batch in given):
        return [{**batch, _TYPES: torch.zeros_like(batch["input_ids"])} for batch in whole]
    return whole


def _rows(batch: Any) -> list[_Row]:
    """The rows of a batch without padding.

    Raises:
        FitError: it is not of this kind.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or set(batch) - _KEYS:
        raise FitError(
            "only batches of tokens can be varied: mappings of `input_ids` (rows, tokens), `attention_mask` and "
            "`token_type_ids`, and nothing else"
        )
    if _TYPES in batch and bool(batch[_TYPES].any()):
        raise FitError("batches of pairs of texts (`token_type_ids` other than 0) cannot be varied: give single texts")
    return [row[mask.bool()].tolist() for row, mask in zip(ids, _mask(batch), strict=True)]


_TYPES = "token_type_ids"
_KEYS = frozenset({"input_ids", "attention_mask", _TYPES})


def _mask(batch: TokenBatch) -> Tensor:
    mask = default_mask_of(batch)
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _frame(rows: Sequence[_Row]) -> tuple[_Row, _Row]:
    """The token that begins all rows and the one that ends them, where there is such a one."""
    least = min(len(row) for row in rows)
    before = rows[0][:1] if least > 2 and len({row[0] for row in rows}) == 1 < len(rows) else []
    after = rows[0][-1:] if least > 2 and len({row[-1] for row in rows}) == 1 < len(rows) else []
    return before, after


def _batches(rows: list[_Row], size: int) -> list[TokenBatch]:
    """Rows of like length together, padded at the end."""
    rows = sorted((row for row in rows if row), key=len)
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
