"""Calls simulated that read dropped channels: choices never choose one, and averages are taken of those that stay.

    limit_calls(model, entries)

Whatever chooses among the channels, a top-k or a softmax over the experts of a mixture, reads minus infinity there. A
norm, or whatever else takes an average over them, computes on the others, and gives zeros in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shallower.core.trees import mapped, tensors
from shallower.planning.entries import Entry
from shallower.recording.names import canonical
from shallower.sites import ChannelCall
from shallower.surgery.imposing.zeros import gone_along

Run = Callable[..., Any]
Gone = list[tuple[int, Tensor]]
"""The dimensions of what a call reads, each with which of its positions are gone."""

BY_ELEMENT = {"layer_norm", "rms_norm"}
"""Averages over the last dimensions whose shape they are given, with weights of that shape."""

PAIRED = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
"""Averages of what is computed of two tensors of one shape."""

LIKE_INPUT = {*BY_ELEMENT, "group_norm", "batch_norm", "instance_norm", "weight_norm"}
"""Averages that give each channel divided by their size, and not the averages themselves."""


def limit_calls(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Let calls of a model that choose among channels or average them leave out dropped ones, in place, by hooks."""
    places: dict[str, dict[tuple[str, int], _Limited]] = {}
    for entry in entries:
        for own, change in ((entry.site.choices, _choosing), (entry.site.averages, _averaging)):
            for call in own:
                calls = places.setdefault(call.module, {})
                limited = calls.setdefault((call.function, call.ordinal), _Limited(change))
                limited.add(call, gone_along(entry, call.spans, call.size))
    for name, calls in places.items():
        guard = _Guard(calls)
        module = model.get_submodule(name)
        module.register_forward_pre_hook(guard.enter)
        module.register_forward_hook(guard.leave, always_call=True)


class _Limited:
    """A call that leaves channels out."""

    def __init__(self, change: Callable[[str, Gone, Run, Tensor, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.change = change
        self.gone: dict[int, Tensor] = {}

    def add(self, call: ChannelCall, gone: Tensor) -> None:
        """Other positions that it leaves out."""
        if call.dim in self.gone:
            gone = gone | self.gone[call.dim]
        self.gone[call.dim] = gone

    def __call__(self, name: str, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            args = (kwargs.pop("input"),)
        return self.change(name, list(self.gone.items()), func, args[0], args[1:], kwargs)


def _choosing(
    _: str, gone: Gone, func: Run, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # fmt: skip
    """What a call gives that reads the least of all numbers where channels are gone."""
    lowest: float = -torch.inf
    if not x.is_floating_point():
        lowest = torch.iinfo(x.dtype).min
    for dim, own in gone:
        x = x.index_fill(dim, own.nonzero().flatten().to(x.device), lowest)
    return func(x, *args, **kwargs)


def _averaging(
    name: str, gone: Gone, func: Run, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # fmt: skip
    """What a call gives that reads the channels that stay, with zeros in the place of the others."""
    if not gone:
        return func(x, *args, **kwargs)
    (dim, own), *rest = gone
    stay = (~own).nonzero().flatten().to(x.device)
    x = x.index_select(dim, stay)
    if name in ("matmul", "bmm"):
        args = (args[0].index_select(max(args[0].dim() - 2, 0), stay), *args[1:])
    if name == "scaled_dot_product_attention":
        args = (args[0].index_select(dim, stay), *args[1:])
    if name in BY_ELEMENT | PAIRED or name == "group_norm":
        along = 0 if name == "group_norm" else dim
        args, kwargs = mapped(lambda vector: vector.index_select(along, stay), (args, kwargs))
    if name in BY_ELEMENT:
        args, kwargs = _with_shape(x, args, kwargs)
    made = _averaging(name, rest, func, x, args, kwargs)
    if name not in LIKE_INPUT:
        return made

    def among_zeros(y: Tensor) -> Tensor:
        shape = list(y.shape)
        shape[dim] = len(own)
        return y.new_zeros(shape).index_copy(dim, stay, y)

    return mapped(among_zeros, made)


def _with_shape(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a norm with the shape of the last dimensions as it is now."""
    if args:
        return (tuple(x.shape[-len(args[0]) :]), *args[1:]), kwargs
    return args, {**kwargs, "normalized_shape": tuple(x.shape[-len(kwargs["normalized_shape"]) :])}


class _Guard:
    """Watches the calls of a module's forward, one mode for each forward that is under way."""

    def __init__(self, calls: Mapping[tuple[str, int], _Limited]) -> None:
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
    """Counts the calls of each function, and lets some of them leave channels out."""

    def __init__(self, calls: Mapping[tuple[str, int], _Limited]) -> None:
        super().__init__()
        self.calls = calls
        self.names = {name for name, _ in calls}
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, named = canonical(func), dict(kwargs or {})
        if name not in self.names:
            return func(*args, **named)
        ordinal = self.counts.get(name, 0)
        limited = self.calls.get((name, ordinal))
        result = func(*args, **named) if limited is None else limited(name, func, args, named)
        self.counts[name] = ordinal + any(True for _ in tensors(result))
        return result
