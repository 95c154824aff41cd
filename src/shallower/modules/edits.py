"""What surgery did to a model, as data: enough to do it again to a fresh model without its weights.

Every change of structure is one edit, a flat JSON object. Surgery makes its changes through `perform`, and the modules
remember them (see `records.py`); `replay` performs a list from a file, which may be hostile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from shallower.errors import CheckpointError, PlanError, ShallowerError
from shallower.modules.activations import Operand, PartialActivation, SlopeActivation, Twice
from shallower.modules.layers import kind_of, resized, resized_norm
from shallower.modules.records import forget, note, noted
from shallower.modules.rewriting import externalise
from shallower.sites import LinearMap, Place

Edit = dict[str, Any]
"""`{"edit": kind, "name": dotted name, ...arguments}`."""

_MOST_CHANNELS = 2**24
_MOST_WEIGHTS = 2**36


def edits(model: nn.Module) -> list[Edit]:
    """What surgery did to this model and its parts, in order; empty for a model it did not touch."""
    return [{**edit, _key(edit): name} for name, edit in noted(model)]


def perform(model: nn.Module, edit: Edit) -> nn.Module:
    """Change `model` in place as one edit says, and record it.

    Returns:
        The module that stands at the edit's place now; the weights of layers are not set.
    """
    name = edit[_key(edit)]
    before = model.get_submodule(name)
    made = _PERFORM[edit["edit"]](model, edit)
    changed = model.get_submodule(name)
    if changed is before:
        note(edit, changed, before)
    else:
        prefix, _, child = name.rpartition(".")
        note(edit, changed, before, model.get_submodule(prefix), child)
    return made


def _key(edit: Mapping[str, Any]) -> str:
    """The field that says where the changed module stands."""
    return "module" if edit["edit"] == "externalise" else "name"


def resize(model: nn.Module, m: LinearMap) -> nn.Module:
    """Exchange the layer at `m.name` for one of the sizes of `m`, and record it; its weights are not set."""
    given = {key: value for key, value in asdict(m).items() if key in _FIELDS["map"]}
    return perform(model, {"edit": "map"} | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})


def replay(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Give a fresh model the structure that another one has after surgery, in place.

    Works on the meta device; weights are not set and are loaded afterwards.

    Args:
        model: built as the original was before any surgery.
        edits: what `edits` returned, perhaps through a file.

    Returns:
        `model`.

    Raises:
        CheckpointError: the list is malformed, or does not fit the model.
    """
    if not isinstance(edits, (list, tuple)):
        raise CheckpointError("the edits of a saved model are a list")
    for i, edit in enumerate(edits):
        checked = _checked(i, edit)
        try:
            perform(model, checked)
        except CheckpointError:
            raise
        except (ShallowerError, AttributeError, TypeError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"edit {i} ({checked['edit']} at {_place(checked) or 'the model'!r}) does not fit the model: {error}. "
                "Is this the architecture that was saved?"
            ) from error
    return model


def exchange(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Set `module` at a dotted name; it takes over the mode (train or eval) of what stood there."""
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)
    return module


def _externalise(model: nn.Module, edit: Edit) -> nn.Module:
    place = Place(edit["module"], tuple((str(name), int(ordinal)) for name, ordinal in edit["calls"]))
    before = set(model.modules())
    child = model.get_submodule(externalise(model, place))
    if child not in before:
        forget(child)
    return child


def _map(model: nn.Module, edit: Edit) -> nn.Module:
    module = model.get_submodule(edit["name"])
    pairs: dict[str, Any] = {key: tuple(edit[key]) for key in ("kernel", "stride", "padding", "dilation")}
    kind = kind_of(module)
    if kind != edit["kind"]:
        raise PlanError(f"`{edit['name']}` is a {type(module).__name__}, not a {edit['kind']} layer")
    sizes = {key: edit[key] for key in ("d_in", "d_out", "bias", "groups")}
    m = LinearMap(name=edit["name"], kind=edit["kind"], positions=0, **sizes, **pairs)
    return exchange(model, edit["name"], resized(module, m))


def _norm(model: nn.Module, edit: Edit) -> nn.Module:
    return exchange(model, edit["name"], resized_norm(model.get_submodule(edit["name"]), edit["channels"]))


def _identity(model: nn.Module, edit: Edit) -> nn.Module:
    return exchange(model, edit["name"], nn.Identity())


def _twice(model: nn.Module, edit: Edit) -> nn.Module:
    return exchange(model, edit["name"], Twice(edit["channels_first"]))


def _operand(model: nn.Module, edit: Edit) -> nn.Module:
    return exchange(model, edit["name"], Operand(edit["index"]))


def _padding(model: nn.Module, edit: Edit) -> nn.Module:
    module = model.get_submodule(edit["name"])
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        raise PlanError(f"`{edit['name']}` is not a convolution that pads with zeros")
    # Only this number changes: the weights stay the very parameters that an optimizer may hold.
    module.padding = (edit["padding"][0], edit["padding"][1])
    module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in (0, 1)]
    return module


def _attribute(model: nn.Module, edit: Edit) -> nn.Module:
    module = model.get_submodule(edit["name"])
    if type(vars(module).get(edit["attribute"])) is not int:
        raise PlanError(f"`{edit['name']}` has no whole number {edit['attribute']!r:.80}")
    setattr(module, edit["attribute"], edit["value"])
    return module


def _partial(model: nn.Module, edit: Edit) -> nn.Module:
    f = model.get_submodule(edit["name"])
    partial = PartialActivation(
        f, edit["kept"], edit["linear"], gate=edit["gate"], channels_first=edit["channels_first"]
    )
    return exchange(model, edit["name"], partial)


def _slope(model: nn.Module, edit: Edit) -> nn.Module:
    slope = SlopeActivation(
        model.get_submodule(edit["name"]),
        width=edit["width"] or None,
        family=edit["family"],
        target=edit["target"],
        channels_first=edit["channels_first"],
    )
    # In a float64 model a float32 slope would be the least exact number of all.
    slope.slope.data = slope.slope.data.to(getattr(torch, edit["dtype"]))
    return exchange(model, edit["name"], slope)


def _activation(model: nn.Module, edit: Edit) -> nn.Module:
    return exchange(model, edit["name"], narrowed_activation(model.get_submodule(edit["name"]), edit["channels"]))


def narrowed_activation(f: nn.Module, channels: int) -> nn.Module:
    """An activation with one parameter per channel, for fewer channels; the parameters are unset.

    Raises:
        PlanError: it is not known how its channels are counted.
    """
    if isinstance(f, nn.PReLU):
        narrowed = nn.PReLU(channels)
        narrowed.weight = nn.Parameter(f.weight.new_empty(channels), requires_grad=f.weight.requires_grad)
        return narrowed
    if isinstance(f, SlopeActivation):
        narrower = SlopeActivation(
            f.f, width=channels, family=f.family, target=f.target, channels_first=f.channels_first
        )
        narrower.slope = nn.Parameter(f.slope.new_empty(channels), requires_grad=f.slope.requires_grad)
        return narrower
    raise PlanError(f"it is not known how the channels of a {type(f).__name__} are counted")


_PERFORM: Mapping[str, Callable[[nn.Module, Edit], nn.Module]] = {
    "externalise": _externalise,
    "map": _map,
    "norm": _norm,
    "identity": _identity,
    "twice": _twice,
    "operand": _operand,
    "padding": _padding,
    "attribute": _attribute,
    "partial": _partial,
    "slope": _slope,
    "activation": _activation,
}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_count(value: object, least: int = 0, most: int = _MOST_CHANNELS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_pair(least: int) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_count(v, least, 2**16) for v in value)
    )


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_calls(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(call, (list, tuple)) and len(call) == 2 and _is_name(call[0]) and _is_count(call[1])
        for call in value
    )


def _one_of(*choices: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _is_size(value: object) -> bool:
    return _is_count(value, 1)


_FIELDS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "externalise": {"module": lambda v: isinstance(v, str) and len(v) <= 1000, "calls": _is_calls},
    "map": {
        "name": _is_name,
        "kind": _one_of("linear", "conv1d", "conv2d"),
        "d_in": _is_size,
        "d_out": _is_size,
        "bias": _is_bool,
        "kernel": _is_pair(1),
        "stride": _is_pair(1),
        "padding": _is_pair(0),
        "dilation": _is_pair(1),
        "groups": _is_size,
    },
    "norm": {"name": _is_name, "channels": _is_size},
    "identity": {"name": _is_name},
    "twice": {"name": _is_name, "channels_first": _is_bool},
    "operand": {"name": _is_name, "index": lambda value: _is_count(value, 0, 1)},
    "padding": {"name": _is_name, "padding": _is_pair(0)},
    "attribute": {"name": lambda v: isinstance(v, str) and len(v) <= 1000, "attribute": _is_name, "value": _is_count},
    "partial": {
        "name": _is_name,
        "kept": _is_count,
        "linear": _is_count,
        "gate": _one_of("", "separate", "packed"),
        "channels_first": _is_bool,
    },
    "slope": {
        "name": _is_name,
        "width": _is_count,
        "family": _one_of("blend", "prelu"),
        "target": _one_of("identity", "one"),
        "channels_first": _is_bool,
        "dtype": _one_of("float32", "float64"),
    },
    "activation": {"name": _is_name, "channels": _is_size},
}


def _place(edit: Mapping[str, Any]) -> str:
    return str(edit.get("name", edit.get("module", "")))


def _checked(i: int, edit: object) -> Edit:
    if not isinstance(edit, Mapping):
        raise CheckpointError(f"edit {i} of the saved model is not an object")
    kind = edit.get("edit")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise CheckpointError(f"edit {i} of the saved model is of the unknown kind {kind!r}")
    fields = _FIELDS[kind]
    if set(edit) != {"edit", *fields}:
        odd = sorted(str(key) for key in set(edit) ^ {"edit", *fields})
        raise CheckpointError(f"edit {i} ({kind}) of the saved model has missing or unknown fields: {', '.join(odd)}")
    for key, valid in fields.items():
        if not valid(edit[key]):
            raise CheckpointError(f"edit {i} ({kind}) of the saved model: {edit[key]!r:.80} is not a value for {key!r}")
    if kind == "map":
        weights = edit["d_in"] * edit["d_out"] * edit["kernel"][0] * edit["kernel"][1]
        if weights > _MOST_WEIGHTS:
            raise CheckpointError(f"edit {i} (map) of the saved model asks for a layer of {weights:.1e} weights")
        if edit["d_in"] % edit["groups"] or edit["d_out"] % edit["groups"]:
            raise CheckpointError(f"edit {i} (map) of the saved model: the groups do not divide the channels")
    return dict(edit)
