"""Make any pointwise operation of a model a module of its own, so that it can be exchanged by its name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shallower.errors import SiteError
from shallower.sites import Place
from shallower.tracing import Frame


def steps_of(frame: Frame) -> tuple[str, ...]:
    return ()


def reason_not_rewritable(model: nn.Module, place: Place, expected: Sequence[str] | None = None) -> str:
    """Why `place` cannot be made a module."""
    return "not yet" if place.calls else ""


def externalise(model: nn.Module, place: Place) -> str:
    """The dotted name of a module that is exactly the operation at `place`."""
    if place.calls:
        raise SiteError(str(place))
    return place.module
