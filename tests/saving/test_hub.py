"""The hub where it cannot be reached."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shallower.app.models import load_model
from shallower.errors import ModelError
from shallower.saving import hub

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An address at which nobody listens."""
    hub.is_reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    hub.is_reachable.cache_clear()


@pytest.mark.usefixtures("unreachable")
def test_a_hub_that_cannot_be_reached_is_offline_meanwhile() -> None:
    assert not hub.is_reachable()
    with hub.as_reachable():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("unreachable")
def test_a_model_of_a_hub_that_cannot_be_reached_is_one_sentence_at_once() -> None:
    pytest.importorskip("transformers")
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"^nosuch: there is no such directory, and the hub cannot be reached$"):
        load_model("nosuch")
    assert time.monotonic() - began < 20
