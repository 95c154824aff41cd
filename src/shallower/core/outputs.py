"""What a model returns."""

from __future__ import annotations

from typing import Any


def are_logits(output: Any) -> bool:
    """Whether a model calls its output logits of several classes.

        are_logits(model(**batch))

    A Transformers output has a field of that name for regression too, with one number a row: that is no distribution.
    """
    logits = getattr(output, "logits", None)
    return logits is not None and logits.dim() > 0 and logits.shape[-1] > 1
