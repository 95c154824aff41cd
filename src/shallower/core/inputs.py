"""How a batch is handed to a model.

A batch is what the model takes: one tensor, a tuple of positional arguments, or a mapping of keyword
arguments (a Transformers batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.failures import failing
from shallower.core.modes import single_pass
from shallower.core.trees import mapped, tensors
from shallower.errors import ForwardError, SiteError

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a model is called with."""

InputsOf = Callable[[Any], Inputs]
"""Picks the model's inputs out of a batch of the user's data."""


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Raised within a pass to end it early, on purpose; `call` lets it through."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` on a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

        output = call(model, {"input_ids": ids})

    Raises:
        SiteError: the inputs are none of these.
        ForwardError: the model raises something of its own; one of Shallower's errors passes unchanged.
        OutOfMemoryError: there is not enough memory.
    """
    # what was made in torch.inference_mode cannot be saved for a backward pass
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors(inputs)):
        inputs = mapped(torch.clone, inputs)
    place = f"{type(model).__name__} does not run on these inputs"
    with failing(ForwardError, place, through=(Stopped,)), single_pass(model):
        return bare_call(model, inputs)


def bare_call(model: nn.Module, inputs: Inputs) -> Any:
    """What `call` does and nothing around it, for what is timed: errors come as they are, and traces stay.

        with failing(ModelError, "the model does not run"), unchanged(model):
            seconds = timeit.timeit(lambda: bare_call(model, inputs), number=100)

    Raises:
        SiteError: the inputs are none of those that a model is called with.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    raise SiteError(
        f"a model is called with a tensor, a tuple or a dict of its arguments, not with a {type(inputs).__name__}"
    )


def arguments_in(inputs: Inputs) -> int:
    """How many arguments a model is called with."""
    if isinstance(inputs, (tuple, list, Mapping)):
        return len(inputs)
    return 1


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    return tensor.device


def default_inputs_of(batch: Any) -> Inputs:
    """The inputs in a batch: of `(inputs, labels)` the inputs, a mapping without its labels, a tensor itself."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        first: Inputs = batch[0]
        return first
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    if isinstance(batch, Tensor):
        return batch
    raise SiteError(
        f"a batch is a tensor, a tuple, a dict or (inputs, labels), not a {type(batch).__name__}; "
        "say with inputs_of= how to read yours"
    )


def reiterable(batches: Iterable[Any]) -> Iterable[Any]:
    """`batches` itself, if it can be iterated more than once.

    Raises:
        SiteError: `batches` is a one-shot iterator; the error names the remedy.
    """
    if isinstance(batches, Iterator):
        raise SiteError(
            "the batches are a one-shot iterator, and they are read several times: "
            "pass a list (list(batches)), a DataLoader or a data set"
        )
    return batches


MaskOf = Callable[[Any], Tensor | None]


def default_mask_of(batch: Any) -> Tensor | None:
    """The two-dimensional `attention_mask` of a batch that is a mapping or (mapping, labels), if there is one."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    # a mask of more dimensions says who may look at whom, not which positions count
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return None
