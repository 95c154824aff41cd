"""Whether what a model returns is a distribution."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from shallower.core.outputs import are_logits


def test_only_what_is_called_logits_of_several_classes_is() -> None:
    assert are_logits(SimpleNamespace(logits=torch.zeros(2, 3)))
    assert not are_logits(SimpleNamespace(logits=torch.zeros(2, 1)))
    assert not are_logits(SimpleNamespace(logits=None))
    assert not are_logits(torch.zeros(2, 3))
