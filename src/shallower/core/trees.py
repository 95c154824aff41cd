"""Copies of nested batches: cloned, or in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def cloned(value: Any) -> Any:
    """Inputs that a model may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: cloned(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(cloned(item) for item in value)
    return value


def doubled(value: Any) -> Any:
    """Inputs in float64, where they are floating-point numbers."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(doubled(item) for item in value)
    return value
