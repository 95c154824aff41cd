"""Dropped branches simulated: all their layers run, and what they give is zero; what a layer reads goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.trees import mapped, tensors
from shallower.modules.prepared.absent import first_tensor
from shallower.planning.entries import Entry


def impose_branches(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Let dropped branches add nothing, and dropped layers change nothing, in place, by hooks."""
    for entry in entries:
        branch = entry.site.branch
        if branch is None:
            continue
        if branch.layer:
            layer, passed = model.get_submodule(branch.layer), _PassedBy()
            layer.register_forward_pre_hook(passed.enter, with_kwargs=True)
            layer.register_forward_hook(passed.leave)
        else:
            model.get_submodule(branch.closing).register_forward_hook(_zeroed)


def _zeroed(_module: nn.Module, _args: Any, output: Any) -> Any:
    return mapped(torch.zeros_like, output)


class _PassedBy:
    """Gives what a layer reads in the place of what it gives. The layer may write into what it reads."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.waiting.append(first_tensor((*args, *kwargs.values())).clone())

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        stream, changed = self.waiting.pop(), next(tensors(output))
        return mapped(lambda tensor: stream if tensor is changed else tensor, output)
