"""How every forward pass of ours runs over a user's model.

with evaluating(model):
    output = call(model, inputs)
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
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
    for Transformer encoders, which passes hooks by and packs batches into nested tensors, is off. After each pass
    over the model, tensors that its modules keep in attributes are what they were before. Afterwards every module is
    in its own mode again, and random numbers go on as if nothing had run.

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
        stack.callback(kept.put_back)
        stack.callback(model.register_forward_pre_hook(lambda *_: kept.begin()).remove)
        stack.callback(model.register_forward_hook(lambda *_: kept.put_back(), always_call=True).remove)
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


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
    """The tensors that modules keep in attributes, as they are now."""

    _first_hook: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._before = [self._state(module) for module in self._modules]

    def begin(self) -> None:
        """A pass begins: hooks that are registered from now on are its own."""
        self._first_hook = RemovableHandle.next_id

    def put_back(self) -> None:
        """Let every module keep what it kept at first."""
        if self._first_hook is not None and self._first_hook != RemovableHandle.next_id:
            self._remove_hooks(self._first_hook)
        self._first_hook = None
        for module, before in zip(self._modules, self._before, strict=True):
            now = vars(module)
            for name in [name for name in now if name not in before and _is_attribute(name)]:
                if _holds_tensors(now[name]):
                    del now[name]
            for name, (value, restored) in before.items():
                if restored is not None:
                    restored()
                if now.get(name, _Kept) is not value and (_holds_tensors(now.get(name)) or _holds_tensors(value)):
                    now[name] = value

    def _remove_hooks(self, first: int) -> None:
        for module in self._modules:
            for name, table in vars(module).items():
                if name.endswith("_hooks") and isinstance(table, dict):
                    for key in [key for key in table if isinstance(key, int) and key >= first]:
                        del table[key]

    @staticmethod
    def _state(module: nn.Module) -> dict[str, tuple[Any, Callable[[], None] | None]]:
        return {name: (value, _content(value)) for name, value in vars(module).items() if _is_attribute(name)}


def _is_attribute(name: str) -> bool:
    return name not in _STRUCTURE and not name.startswith("_shallower") and not name.endswith("_hooks")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (Tensor, list, dict, tuple, deque)) and next(tensors(value), None) is not None


def _content(value: Any) -> Callable[[], None] | None:
    """How a collection that a forward may add tensors to gets its content back; None for anything else."""
    if type(value) not in (list, dict, deque):
        return None
    before = value.copy()

    def restore() -> None:
        if _is_as(value, before) or not (_holds_tensors(value) or _holds_tensors(before)):
            return
        value.clear()
        if isinstance(value, dict):
            value.update(before)
        else:
            value.extend(before)

    return restore


def _is_as(value: Any, before: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == list(before) and all(value[key] is before[key] for key in before)
    return len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))


@contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    """Afterwards the generators of torch, NumPy and Python go on as if nothing had run."""
    own = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
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
