"""A copy of a model for trials: it is cut, run, and made whole again.

skeleton = Skeleton(model, weightless(model.parameters()))
with skeleton.lent() as trial:
    perform(trial, edit)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from shallower.modules.attachment import copied


class Skeleton:
    """A copy whose structure and tensors can be changed and taken back, without its being copied again.

    Args:
        model: not changed.
        memo: what stands for some of its parts, as in `copied`.
    """

    def __init__(self, model: nn.Module, memo: Mapping[int, Any]) -> None:
        self._model = copied(model, memo)
        self._states: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        self._contents: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for module in self._model.modules():
            state = vars(module)
            self._states.append((module, type(module), dict(state)))
            for held in state.values():
                if isinstance(held, dict):
                    self._contents.append((held, dict(held)))

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """The copy, to change it as edits do; afterwards it is as before."""
        try:
            yield self._model
        finally:
            for module, kind, state in self._states:
                module.__class__ = kind
                vars(module).clear()
                vars(module).update(state)
            for held, content in self._contents:
                held.clear()
                held.update(content)
