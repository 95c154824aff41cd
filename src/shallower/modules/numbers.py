"""Whole numbers that fall with channels: those that modules hold, and those that are written in forwards."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shallower.modules.edits import Attribute, Number
from shallower.modules.written import numbers_written
from shallower.sites import Follower


def fallen(model: nn.Module, followers: Iterable[Follower], gone: int) -> list[Attribute | Number]:
    """The edits with which numbers fall when so many channels go.

    Args:
        model: as earlier edits left it; not changed.
        followers: of one site.
        gone: how many of its channels go.
    """
    edits: list[Attribute | Number] = []
    for follower in followers:
        module = model.get_submodule(follower.module)
        written = follower.written
        if written is None:
            now = getattr(module, follower.attribute)
            edits.append(Attribute(follower.module, follower.attribute, now - follower.each * gone))
            continue
        now = numbers_written(module).get(written.path, {}).get(written.place, written.value)
        fewer = follower.each * gone
        # a slice counts from the end where it is negative
        edits.append(Number(follower.module, written, now + fewer if now < 0 < fewer else now - fewer))
    return edits
