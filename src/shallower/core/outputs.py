"""What a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def are_logits(output: Any) -> bool:
    """Whether a model calls its output logits of several classes.

        are_logits(model(**batch))

    A Transformers output has a field of that name for regression too, with one number a row: that is no distribution.
    """
    logits = getattr(output, "logits", None)
    return logits is not None and logits.dim() > 0 and logits.shape[-1] > 1


def without_heads(output: Any) -> Any:
    """An output without what has a size for each attention head: a cache of keys and values, attention weights."""
    if isinstance(output, Mapping):
        return [without_heads(value) for key, value in output.items() if not str(key).endswith("attentions")]
    if isinstance(output, (tuple, list)):
        return [without_heads(item) for item in output]
    if any(c.__module__ == "transformers.cache_utils" for c in type(output).__mro__):
        return None
    return output
