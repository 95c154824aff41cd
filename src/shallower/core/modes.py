"""How every forward pass of ours runs over a user's model.

with evaluating(model):
    output = call(model, inputs)
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from shallower.core.tensors import has_no_numbers
from shallower.core.trees import tensors

_STRUCTURE = frozenset({"training", "_parameters", "_modules", "_buffers", "forward"})


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, and nothing of it left behind.

        with evaluating(model):
            output = call(model, inputs)

    Within, there are no gradients and no `torch.inference_mode`, compiled parts run eagerly, and PyTorch's fused path
    for Transformer encoders, which passes hooks by and packs batches into nested tensors, is off. What a forward leaves
    in modules is taken back: attributes, hooks, buffers, and what it writes into tensors of these, after each pass that
    `call` makes, and tensors in attributes at the end, also where something else called the model. A module that is put
    into training mode within keeps what it learns in its buffers. Afterwards every module is in its own mode again, and
    random numbers go on as if nothing had run.

    Args:
        model: that is called within.
        gradients: whether gradients are on. What was written then goes back before the next pass or at the end, since
            the backward pass of this one may read it.
    """
    kept, buffers = _Kept(model), _Buffers()
    with ExitStack() as stack:
        stack.enter_context(_same_random_state(model))
        stack.enter_context(without_inference_mode())
        stack.enter_context(_eagerly())
        stack.enter_context(_unfused())
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.callback(kept.put_back, tensors_only=True)
        stack.callback(buffers.put_back)
        _evaluated.append((model, buffers))
        stack.callback(_evaluated.pop)
        stack.enter_context(in_eval_mode(model))
        compute_anew(model)
        yield


_evaluated: list[tuple[nn.Module, _Buffers]] = []
"""The models that are within `evaluating`, the innermost last."""


def compute_anew(model: nn.Module) -> None:
    """Let modules drop what they keep computed of their weights, as they do where these move.

        compute_anew(model)     # relative positions that attention has looked up once, for instance

    That is what an `_apply` of their own is for; those of recurrent layers lay weights side by side.
    """
    for module in model.modules():
        if type(module)._apply is not nn.Module._apply and not isinstance(module, nn.RNNBase):
            module._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and nothing else: of what a pass leaves behind only `evaluating` and `unchanged` take care."""
    with same_modes(model):
        for module in model.modules():
            module.training = False  # eval() may be overridden, and do more than can be undone
        yield


@contextmanager
def single_pass(model: nn.Module) -> Iterator[None]:
    """One pass over a model; within `evaluating`, it is `unchanged` by it."""
    for other, buffers in _evaluated:
        if model is other:
            with _unchanged(model, buffers, [module for module in model.modules() if not module.training]):
                yield
            return
    yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards attributes, hooks and buffers are what they were, whatever the model's forward did to them.

    with in_eval_mode(model), unchanged(model):
        seconds = timeit.timeit(lambda: model(x), number=100)
    """
    buffers = _Buffers()
    try:
        with _unchanged(model, buffers, model.modules()):
            yield
    finally:
        buffers.put_back()


@contextmanager
def _unchanged(model: nn.Module, buffers: _Buffers, owners: Iterable[nn.Module]) -> Iterator[None]:
    kept = _Kept(model)
    buffers.put_back()
    buffers.keep(owners)
    first_hook = RemovableHandle.next_id
    try:
        yield
    finally:
        kept.put_back()
        if not torch.is_grad_enabled():
            buffers.put_back()
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


class _Buffers:
    """The buffers of a model before a pass, and what they and tensors in attributes hold.

    Tensors are copied once, and again only where something between two passes has changed them.
    """

    def __init__(self) -> None:
        self._tables: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._held: list[tuple[nn.Module, _Copy]] = []
        self._copies: dict[int, _Copy] = {}

    def keep(self, owners: Iterable[nn.Module]) -> None:
        self._tables = [(module, dict(module._buffers)) for module in owners]
        with _unseen():
            for module, table in self._tables:
                for tensor in chain(table.values(), _in_attributes(module)):
                    if tensor is None or not _is_written(tensor):
                        continue
                    copy = self._copies.get(id(tensor))
                    if copy is None or module.training or copy.is_outdated():
                        copy = self._copies[id(tensor)] = _Copy(tensor)
                    self._held.append((module, copy))

    def put_back(self) -> None:
        """Let the owners have these buffers and contents again; does nothing the second time."""
        for module, table in self._tables:
            # a scripted module has no dictionary, and no forward in Python that could change it
            if isinstance(module._buffers, dict) and not _is_as(module._buffers, table):
                module._buffers.clear()
                module._buffers.update(table)
        with _unseen():
            for module, copy in self._held:
                # no version tells that `torch.batch_norm` has written into statistics
                if module.training or copy.is_outdated():
                    copy.put_back()
        self._tables, self._held = [], []


class _Copy:
    """A tensor and what it held."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._content = tensor.detach().clone()
        self._version = _version(tensor)

    def is_outdated(self) -> bool:
        """Whether something may have been written into the tensor since."""
        return self._version is None or self._version != _version(self._tensor)

    def put_back(self) -> None:
        with torch.inference_mode(self._tensor.is_inference()), torch.no_grad():
            if self._tensor.shape == self._content.shape:
                self._tensor.copy_(self._content)
            else:
                self._tensor.data = self._content.clone()
        self._version = _version(self._tensor)


def _is_written(tensor: Tensor) -> bool:
    """Whether a forward may write to it: it has numbers, and does not repeat the same memory."""
    if is_lazy(tensor) or has_no_numbers(tensor):
        return False
    return tensor.layout is not torch.strided or not torch._debug_has_internal_overlap(tensor)


def _version(tensor: Tensor) -> int | None:
    """Another number whenever something is written into the tensor; None for what was made in inference mode."""
    if tensor.is_inference():
        return None
    return tensor._version


@contextmanager
def _unseen() -> Iterator[None]:
    """Within, operators are seen by nobody who records a pass, and compute numbers."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


_ABSENT = object()


@cache
def _is_attribute(name: str) -> bool:
    return name not in _STRUCTURE and not name.startswith("_shallower") and not name.endswith("_hooks")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (Tensor, list, dict, tuple, deque)) and next(tensors(value), None) is not None


def _in_attributes(module: nn.Module) -> Iterator[Tensor]:
    """Tensors, and those in collections; parameters are none that a forward writes to."""
    for name, value in vars(module).items():
        held: Iterable[Any] = ()
        if isinstance(value, Tensor):
            held = (value,)
        elif isinstance(value, (list, tuple, deque)):
            held = value
        elif isinstance(value, dict):
            held = value.values()
        for item in held:
            if isinstance(item, Tensor) and not isinstance(item, nn.Parameter) and _is_attribute(name):
                yield item


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
