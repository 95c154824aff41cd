"""Inputs beside weights that have no data: on the meta device, or fake tensors.

with placed(model, example_inputs) as inputs:
    model(*inputs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shallower.core.inputs import Inputs, model_device
from shallower.core.trees import mapped, tensors, to_device


@contextmanager
def placed(model: nn.Module, example_inputs: Inputs) -> Iterator[Inputs]:
    """The inputs where the model can take them.

    Where weights have no data (meta device, fake tensors), whatever is computed from the inputs alone still runs on
    real values, so that code which looks at them (masks, lengths, padding) takes its usual way.
    """
    weights = [*model.parameters(), *model.buffers()]
    if not any(weight.is_meta or isinstance(weight, FakeTensor) for weight in weights):
        yield to_device(example_inputs, model_device(model))
        return
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    blanks: dict[int, Tensor] = {}
    with unset_fake_temporarily():
        inputs = mapped(_filled, example_inputs)
        try:
            for module in model.modules():
                tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for table in tables:
                    for name, tensor in table.items():
                        if isinstance(tensor, FakeTensor):
                            if id(tensor) not in blanks:
                                blanks[id(tensor)] = _blank(tensor)
                            swapped.append((table, name, tensor))
            for table, name, tensor in swapped:
                table[name] = blanks[id(tensor)]
            with _DataIsOptional():  # type: ignore[no-untyped-call]
                yield inputs
        finally:
            for table, name, tensor in swapped:
                table[name] = tensor


def _blank(tensor: Tensor) -> Tensor:
    """A tensor on the meta device, or a parameter there, like a fake one."""
    blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


def _filled(tensor: Tensor) -> Tensor:
    """A tensor of ones for one that has no data; any other itself."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return tensor


class _DataIsOptional(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets tensors with and without data meet: what reads one without has none, and everything else has."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        missing = any(tensor.is_meta for tensor in tensors((args, named)))
        if missing:
            args, named = tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, (args, named))
        if named.get("device") is not None:
            named["device"] = torch.device("meta" if missing else "cpu")
        return func(*args, **named)
