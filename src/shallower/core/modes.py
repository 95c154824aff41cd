"""How every forward pass of ours runs over a user's model.

with evaluating(model):
    output = call(model, inputs)
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shallower.core.trees import tensors

_STRUCTURE = frozenset({"training", "_parameters", "_modules", "_buffers", "forward"})


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, and nothing of it left behind.

        with evaluating(model):
            output = call(model, inputs)

    Within, there are no gradients and no `torch.inference_mode`, compiled parts run eagerly, and PyTorch's fused path
    for Transformer encoders, which passes hooks by and packs batches into nested tensors, is off. What a forward leaves
    in attributes of modules is taken back: all of it after each pass that `call` makes, and tensors at the end, also
    where something else called the model. Afterwards every module is in its own mode again, and random numbers go on as
    if nothing had run.

    Args:
        model: that is called within.
        gradients: whether gradients are on.
    """
    kept = _Kept(model)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(_same_random_state(model))
        stack.enter_context(without_inference_mode())
        stack.enter_context(_eagerly())
        stack.enter_context(_unfused())
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.callback(kept.put_back, tensors_only=True)
        _evaluated.append(model)
        stack.callback(_evaluated.pop)
        try:
            for module, _ in modes:
                module.training = False  # eval() may be overridden, and do more than can be undone
            yield
        finally:
            for module, training in modes:
                module.training = training


_evaluated: list[nn.Module] = []
"""The models that are within `evaluating`, the innermost last."""


@contextmanager
def single_pass(model: nn.Module) -> Iterator[None]:
    """One pass over a model; within `evaluating`, its attributes and hooks are what they were afterwards."""
    if not any(model is other for other in _evaluated):
        yield
        return
    kept = _Kept(model)
    first_hook = RemovableHandle.next_id
    try:
        yield
    finally:
        kept.put_back()
        if first_hook != RemovableHandle.next_id:
            kept.remove_hooks(first_hook)


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Ordinary tensors, also where the caller is in `torch.inference_mode`; also for whole functions.

    @without_inference_mode()
    def apply(model): ...
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Kept:
    """What modules have in attributes now, apart from parameters, buffers, parts and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._before = [dict(vars(module)) for module in self._modules]
        # a forward may also write into a collection and leave the attribute as it is
        self._contents = []
        for before in self._before:
            for name, value in before.items():
                if _is_attribute(name) and type(value) in (list, dict, deque):
                    self._contents.append((value, value.copy()))

    def put_back(self, tensors_only: bool = False) -> None:
        """Let every module have what it had; `tensors_only` leaves alone what never held tensors."""
        for module, before in zip(self._modules, self._before, strict=True):
            now = vars(module)
            for name in filter(_is_attribute, {*now, *before}):
                value, old = now.get(name, _ABSENT), before.get(name, _ABSENT)
                if value is old or (tensors_only and not (_holds_tensors(value) or _holds_tensors(old))):
                    continue
                if old is _ABSENT:
                    del now[name]
                else:
                    now[name] = old
        for value, content in self._contents:
            if not _is_as(value, content) and (not tensors_only or _holds_tensors(value) or _holds_tensors(content)):
                value.clear()
                if isinstance(value, dict):
                    value.update(content)
                else:
                    value.extend(content)

    def remove_hooks(self, first: int) -> None:
        """Remove hooks from this number on, wherever they are registered."""
        for module in self._modules:
            for name, table in vars(module).items():
                if name.endswith("_hooks") and isinstance(table, dict):
                    for key in list(table):
                        if isinstance(key, int) and key >= first:
                            del table[key]


_ABSENT = object()


def _is_attribute(name: str) -> bool:
    return name not in _STRUCTURE and not name.startswith("_shallower") and not name.endswith("_hooks")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (Tensor, list, dict, tuple, deque)) and next(tensors(value), None) is not None


def _is_as(value: Any, before: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == list(before) and all(value[key] is before[key] for key in before)
    return len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))


@contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    """Afterwards the generators of torch, NumPy and Python go on as if nothing had run."""
    own = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = None
    if numpy is not None:
        of_numpy = numpy.random.get_state()
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            random.setstate(own)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


@contextmanager
def _eagerly() -> Iterator[None]:
    # without torch._dynamo nothing has been compiled, and to import it takes seconds
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _unfused() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
