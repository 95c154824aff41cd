"""What a model costs: parameters, MACs, bytes, KV cache and peak memory, one function each.

cost = cost_of(model, example_inputs)
cost.params, cost.macs, cost.size, cost.kv
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shallower.core.failures import failing
from shallower.core.inputs import Inputs, call, model_device
from shallower.core.modes import evaluating
from shallower.core.tensors import nbytes_of
from shallower.core.trees import tensors
from shallower.errors import ModelError
from shallower.planning.costs import Cost
from shallower.recording.caches import kv_of
from shallower.recording.macs import mac_counter
from shallower.sites import Sites


def cost_of(model: nn.Module, example_inputs: Inputs) -> Cost:
    """What a model costs on example inputs, in eval mode; all but the latency.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    with evaluating(model):
        macs, output = _counted(model, example_inputs)
    return Cost(count_params(model), macs, size_of(model), kv=kv_of(output))


def cost_as_found(model: nn.Module, sites: Sites) -> Cost:
    """What a model costs on the example inputs that its sites were found with, without running it again.

    cost_after(plan, cost_as_found(model, sites), model)
    """
    return Cost(count_params(model), sites.macs, size_of(model), kv=sites.kv)


def count_params(model: nn.Module) -> int:
    """Parameters of a model; one that is at several places counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; one that is at several places counts once."""
    return nbytes_of((*model.parameters(), *model.buffers()))


def count_macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass, in the mode the model is in: half of what `mac_counter` counts.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    return _counted(model, example_inputs)[0]


def _counted(model: nn.Module, example_inputs: Inputs) -> tuple[int, Any]:
    """MACs of a forward pass, and what it returns."""
    with _composed_transformers(), torch.no_grad(), mac_counter() as counter, running(model):
        output = call(model, example_inputs)
    return int(counter.get_total_flops()) // 2, output


def peak_memory(model: nn.Module, example_inputs: Inputs) -> int:
    """Peak bytes that one forward pass needs: parameters, buffers, inputs, and the most that is alive besides them.

    On CUDA the part besides is what the caching allocator reports, with the kernels' workspaces. Elsewhere it is the
    sum over the live storages of all tensors that operators return, which leaves out what an operator allocates
    inside itself, the allocator's own slack and the Python process. Gradients are off in both.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    given = [*model.parameters(), *model.buffers(), *tensors(example_inputs)]
    with torch.no_grad(), running(model):
        beside = _peak_beside(model, example_inputs, given)
    return sum(map(torch.UntypedStorage.nbytes, _storages(given))) + beside


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Within, what a forward pass raises becomes one sentence that names the model's class.

    Raises:
        ModelError: the model does not run.
    """
    advice = "Pass example inputs as the model is called with them: a tensor, a tuple of arguments or a dict"
    with failing(ModelError, f"{type(model).__name__} does not run on the example inputs", advice):
        yield


def _peak_beside(model: nn.Module, example_inputs: Inputs, given: list[Tensor]) -> int:
    device = model_device(model)
    if device.type == "cuda":
        call(model, example_inputs)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(model, example_inputs)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = _LiveStorages(given)
    with live:
        call(model, example_inputs)
    return live.peak


def _storages(given: Iterable[Tensor]) -> set[torch.UntypedStorage]:
    """The memory that tensors are in, once each."""
    return {tensor.untyped_storage() for tensor in given if tensor.layout is torch.strided}


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators create, from their creation to their release."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known = weakref.WeakSet(_storages(given))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(tensors(result)):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._released, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _released(self, size: int) -> None:
        self.live -= size


@contextmanager
def _composed_transformers() -> Iterator[None]:
    """`nn.TransformerEncoder` without its fused path, whose products no counter sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
