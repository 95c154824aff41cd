"""Dropped branches simulated: all their layers run, and what they give is zero; what a layer reads goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shallower.core.trees import mapped, tensors
from shallower.planning.entries import Entry


def impose_branches(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Let dropped branches add nothing, and dropped layers change nothing, in place, by hooks."""
    for entry in entries:
        branch = entry.site.branch
        if branch is None:
            continue
        if branch.layer:
            model.get_submodule(branch.layer).register_forward_hook(_unchanged, with_kwargs=True)
        else:
            model.get_submodule(branch.closing).register_forward_hook(_zeroed)


def _zeroed(_module: nn.Module, _args: Any, output: Any) -> Any:
    return mapped(torch.zeros_like, output)


def _unchanged(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    stream, changed = next(tensors((args, kwargs))), next(tensors(output))
    return mapped(lambda tensor: stream if tensor is changed else tensor, output)
