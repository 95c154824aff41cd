"""The hub of Hugging Face: never asked where a file is read, and given up soon where it cannot be reached.

    with as_reachable():
        model = AutoModel.from_pretrained(name)

The library of the hub tries for up to a minute to reach it, for each file anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_PATIENCE = 5.0
"""Seconds in which the hub has to answer."""


@contextmanager
def offline() -> Iterator[None]:
    """No request of huggingface_hub goes out meanwhile: what it has in its cache is all there is."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def as_reachable() -> Iterator[None]:
    """The hub is offline meanwhile if it does not answer."""
    if is_reachable():
        yield
        return
    with offline():
        yield


@cache
def is_reachable() -> bool:
    """Whether the hub answers; asked once, and not at all where huggingface_hub is told to be offline."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of whichever library the requests are made with
        return False
    return True


def has_cached(name: str) -> bool:
    """Whether the config of a model lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
