"""Put modules into a model in the place of its activations, and take them out again.

    attach(model, site.activation, SlopeActivation(...))
    detach(model)                       # every module of the model is the object it was before

The record of what stood where lives on the model, so that a deep copy can be detached too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from shallower.core.modes import compute_anew, without_inference_mode
from shallower.core.trees import tensors
from shallower.errors import MethodError, SiteError
from shallower.modules.offloading import shared_weights
from shallower.modules.rewriting import externalise, internalise
from shallower.sites import Place

M = TypeVar("M", bound=nn.Module)

_ATTACHED = "_shallower_attached"


@dataclass
class _Attached:
    name: str
    original: nn.Module


def attach(model: nn.Module, place: Place, module: nn.Module | Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Let `module` do what the operation at `place` did.

    A functional call, or one of several calls of a module, is made a module of its own first.

    Args:
        model: that `place` is relative to.
        place: where.
        module: what to put there; a plain function is called with the module that stands there and makes it. It gets
            that module's mode (train or eval).

    Returns:
        What was put there.

    Raises:
        MethodError: something is attached at this place already.
        SiteError: the model has no such place, or it cannot be exchanged.
    """
    record = _record(model)
    if place in record:
        raise MethodError(
            f"{place}: a {type(attached(model, place)).__name__} is attached here already; detach the earlier method "
            "first (method.detach())"
        )
    name = standing_at(model, place)
    try:
        original = _get(model, name, place)
        replacement = module if isinstance(module, nn.Module) else module(original)
    except Exception:
        internalise(model, place)  # a call that was made a module is a call again
        raise
    model.set_submodule(name, replacement.train(original.training))
    vars(model).setdefault(_ATTACHED, {})[place] = _Attached(name, original)
    return replacement


def attached(model: nn.Module, place: Place) -> nn.Module:
    """The module that is attached at `place`.

    Raises:
        MethodError: nothing is.
    """
    if place not in _record(model):
        raise MethodError(f"{place}: nothing is attached here")
    return model.get_submodule(_record(model)[place].name)


def attached_places(model: nn.Module) -> tuple[Place, ...]:
    """Where something is attached, relative to `model`, in the order of attaching."""
    return tuple(_record(model))


def originals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stood where something is attached to the model or to a part of it, by its dotted name in the model."""
    for prefix, owner in model.named_modules():
        for entry in _record(owner).values():
            yield (f"{prefix}.{entry.name}" if prefix else entry.name), entry.original


def detach(model: nn.Module, places: Iterable[Place] | None = None) -> None:
    """Put back what stood at `places`: everything that is attached to the model or to a part of it where None.

    Places at which nothing is attached are passed over.
    """
    owners = [m for m in model.modules() if _ATTACHED in vars(m)] if places is None else [model]
    for owner in owners:
        record = _record(owner)
        for place in list(record) if places is None else [p for p in places if p in record]:
            entry = record.pop(place)
            owner.set_submodule(entry.name, entry.original.train(owner.get_submodule(entry.name).training))
            internalise(owner, place)
        if not record:
            vars(owner).pop(_ATTACHED, None)


def detached_copy(model: M, memo: Mapping[int, Any] | None = None) -> M:
    """`copied`, with everything attached removed.

    small = detached_copy(model)
    """
    duplicate = copied(model, memo)
    detach(duplicate)
    compute_anew(duplicate)
    return duplicate


def copied(model: M, memo: Mapping[int, Any] | None = None) -> M:
    """A deep copy of a model, whatever is attached to it.

        moved = copied(model)
        skeleton = copied(model, weightless(model.parameters()))

    Weights that are mapped from files (see `offloading.py`) are shared. Tensors with a history that a forward left in
    attributes, which cannot be copied, are copied without it.

    Args:
        model: any.
        memo: what stands for some of its parts, as `copy.deepcopy` takes it: `lent` or `weightless` parameters.
    """
    memo = {**shared_weights(model), **(memo or {})}
    for module in model.modules():
        for tensor in tensors([*vars(module).values()]):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    with without_inference_mode():
        return copy.deepcopy(model, memo)


@contextmanager
def exposed(model: nn.Module, places: Sequence[Place]) -> Iterator[Mapping[Place, nn.Module]]:
    """The module at each place for the length of the context, for hooks.

    What is attached is what stands at its place. Calls that had to be made modules become calls again afterwards.
    """
    record = _record(model)
    temporary = [place for place in places if place.calls and place not in record]
    try:
        yield {place: _get(model, standing_at(model, place), place) for place in places}
    finally:
        for place in temporary:
            internalise(model, place)


def standing_at(model: nn.Module, place: Place) -> str:
    """The dotted name of the module that is the operation at `place`; a call is made a module first."""
    record = _record(model)
    if place in record:
        return record[place].name
    return externalise(model, place)


def _record(model: nn.Module) -> dict[Place, _Attached]:
    record: dict[Place, _Attached] = vars(model).get(_ATTACHED, {})
    return record


def _get(model: nn.Module, name: str, place: Place) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SiteError(f"{place}: the model has no module {name!r}; were the sites found in this model?") from None
