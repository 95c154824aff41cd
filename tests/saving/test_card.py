"""The card of a plain save says how the directory is loaded."""

from __future__ import annotations

from shallower.saving.card import plain_card


def test_a_library_model_loads_by_its_directory() -> None:
    card = plain_card("runs/small", "timm:resnet18")
    assert "model = sh.load('runs/small')" in card
    assert "`timm:resnet18`" in card


def test_any_other_model_needs_a_fresh_instance() -> None:
    assert "model = sh.load('small', model=make_model())" in plain_card("small", "")
