"""Choices simulated: dropped channels are never chosen, and have no share.

    forbid_choices(model, entries)

Whatever chooses among the channels, a top-k or a softmax over the experts of a mixture, reads minus infinity there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shallower.core.trees import tensors
from shallower.planning.entries import Entry
from shallower.recording.tracing import canonical
from shallower.surgery.zeroing import gone_along

Calls = dict[tuple[str, int], tuple[int, Tensor]]
"""(function, ordinal) -> the dimension, and which of its positions are gone."""


def forbid_choices(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Let no call of a model choose dropped channels of followed sites, in place, by hooks."""
    places: dict[str, Calls] = {}
    for entry in entries:
        for choice in entry.site.choices:
            gone = gone_along(entry, choice.spans, choice.size)
            calls = places.setdefault(choice.module, {})
            known = calls.get((choice.function, choice.ordinal))
            if known is not None:
                gone |= known[1]
            calls[choice.function, choice.ordinal] = choice.dim, gone
    for name, calls in places.items():
        guard = _Guard(calls)
        module = model.get_submodule(name)
        module.register_forward_pre_hook(guard.enter)
        module.register_forward_hook(guard.leave, always_call=True)


class _Guard:
    """Watches the calls of a module's forward, one mode for each forward that is under way."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.under_way: list[_Watch] = []

    def enter(self, _module: nn.Module, _args: Any) -> None:
        watch = _Watch(self.calls)
        self.under_way.append(watch)
        watch.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self.under_way:
            self.under_way.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Watch(TorchFunctionMode):
    """Counts the calls of each function, and lets some of them read minus infinity."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.names = {name for name, _ in calls}
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = canonical(func)
        if name not in self.names:
            return func(*args, **named)
        ordinal = self.counts.get(name, 0)
        place = self.calls.get((name, ordinal))
        if place is not None:
            if args:
                args = (_lowered(args[0], *place), *args[1:])
            else:
                named["input"] = _lowered(named["input"], *place)
        result = func(*args, **named)
        self.counts[name] = ordinal + any(True for _ in tensors(result))
        return result


def _lowered(x: Tensor, dim: int, gone: Tensor) -> Tensor:
    """x with the least of its numbers where channels are gone."""
    lowest: float = -torch.inf
    if not x.is_floating_point():
        lowest = torch.iinfo(x.dtype).min
    return x.index_fill(dim, gone.nonzero().flatten().to(x.device), lowest)
