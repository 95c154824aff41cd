"""The changes that surgery makes to a model, as data.

    perform(model, Identity("encoder.layer.0.intermediate.activation"))
    edits(model)                            # what was done to the model, in order
    replay(fresh, edits(model))             # the same structure, without the weights

Performing edits is the only thing that changes a module. All kinds but `Weights` are remembered by the modules that
they change (see `records.py`) and written to files, so that a fresh model can be given the same structure before its
weights are loaded. A file may be hostile: every field has a type and bounds, and what does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from shallower.core.codec import Bounds, decode, encode
from shallower.errors import CheckpointError, OutOfMemoryError, PlanError, ShallowerError
from shallower.modules.activations import (
    Family,
    Operand,
    PartialActivation,
    SlopeActivation,
    Target,
    Twice,
    narrowed_activation,
)
from shallower.modules.layers import kind_of, longest_axis, resize_tensors, resized, resized_norm, weight_of
from shallower.modules.offloading import device_around, own_weights
from shallower.modules.prepared.absent import Absent
from shallower.modules.prepared.attention import is_stock, make_dense
from shallower.modules.prepared.lists import Entries, Settings
from shallower.modules.records import forget, note, noted
from shallower.modules.rewriting import externalise, write_number
from shallower.sites import LinearMap, Place, Written

_MOST_WEIGHTS = 2**36
_MOST_TIMES = 4
"""How often the longest axis of a model's tensors goes into a number that is written in a forward, at most."""


ModuleName = Annotated[str, Bounds(1, 1000)]
Owner = Annotated[str, Bounds(0, 1000)]
Whole = Annotated[int, Bounds(0, 2**24)]
Size = Annotated[int, Bounds(1, 2**24)]
Pixels = Annotated[int, Bounds(0, 2**16)]
StepSizes = Annotated[int, Bounds(1, 2**16)]


def _exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set `module` at a dotted name; it takes over the mode (train or eval) of what stood there."""
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)


@dataclass(frozen=True)
class Externalise:
    """Calls in the forward of `module` become one child module.

    Attributes:
        module: dotted name of the module whose forward makes the calls.
        calls: name and ordinal of each, as in `Place`.
    """

    module: Owner
    calls: tuple[tuple[ModuleName, Whole], ...]
    edit: Literal["externalise"] = field(default="externalise", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Rewrite the forward."""
        before = set(model.modules())
        child = model.get_submodule(externalise(model, Place(self.module, self.calls)))
        if child not in before:  # a copy, which later edits change
            forget(child)


@dataclass(frozen=True)
class Resize:
    """A linear map gets these sizes; its weights are not set."""

    name: ModuleName
    kind: Literal["linear", "conv1d", "conv2d"]
    d_in: Size
    d_out: Size
    bias: bool
    kernel: tuple[StepSizes, StepSizes] = (1, 1)
    stride: tuple[StepSizes, StepSizes] = (1, 1)
    padding: tuple[Pixels, Pixels] = (0, 0)
    dilation: tuple[StepSizes, StepSizes] = (1, 1)
    groups: Size = 1
    edit: Literal["map"] = field(default="map", init=False, repr=False)

    def __post_init__(self) -> None:
        weights = self.d_in * self.d_out * self.kernel[0] * self.kernel[1]
        if weights > _MOST_WEIGHTS:
            raise PlanError(f"`{self.name}`: a layer of {weights:.1e} weights is too large")
        if self.d_in % self.groups or self.d_out % self.groups:
            raise PlanError(f"`{self.name}`: the groups do not divide the channels")

    @classmethod
    def to(cls, m: LinearMap) -> Resize:
        """The edit that gives the layer at `m.name` the sizes of `m`."""
        geometry = (m.kernel, m.stride, m.padding, m.dilation, m.groups)
        return cls(m.name, m.kind, m.d_in, m.d_out, m.bias, *geometry)

    def perform(self, model: nn.Module) -> None:
        """Exchange the layer."""
        module = model.get_submodule(self.name)
        if kind_of(module) != self.kind:
            raise PlanError(f"`{self.name}` is a {type(module).__name__}, not a {self.kind} layer")
        m = LinearMap(
            self.name,
            self.kind,
            self.d_in,
            self.d_out,
            self.bias,
            positions=0,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        _exchange(model, self.name, resized(module, m))


@dataclass(frozen=True)
class Norm:
    """A BatchNorm gets this width; its vectors are not set."""

    name: ModuleName
    channels: Size
    edit: Literal["norm"] = field(default="norm", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the BatchNorm."""
        _exchange(model, self.name, resized_norm(model.get_submodule(self.name), self.channels))


@dataclass(frozen=True)
class Identity:
    """A module becomes `nn.Identity`.

    The numbers and other plain settings of the module stay as attributes, for a forward that reads the stride or the
    width of a layer that is gone.
    """

    name: ModuleName
    edit: Literal["identity"] = field(default="identity", init=False, repr=False)

    _SETTINGS: ClassVar[tuple[type, ...]] = (int, float, str, tuple)

    def perform(self, model: nn.Module) -> None:
        """Exchange the module."""
        gone, identity = model.get_submodule(self.name), nn.Identity()
        for name, value in vars(gone).items():
            if isinstance(value, self._SETTINGS) and not name.startswith("_") and name != "training":
                setattr(identity, name, value)
        _exchange(model, self.name, identity)


@dataclass(frozen=True)
class Doubled:
    """The packed producer of a gated site becomes `Twice`, which passes its input on as gate and as up projection."""

    name: ModuleName
    channels_first: bool
    edit: Literal["twice"] = field(default="twice", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the producer."""
        _exchange(model, self.name, Twice(self.channels_first))


@dataclass(frozen=True)
class Summand:
    """A sum becomes `Operand`, which returns one of the two: the other was folded into the layer before."""

    name: ModuleName
    index: Annotated[int, Bounds(0, 1)]
    edit: Literal["operand"] = field(default="operand", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the sum."""
        _exchange(model, self.name, Operand(self.index))


@dataclass(frozen=True)
class Padding:
    """A convolution gets this zero padding.

    Only the number changes: its weights stay the very parameters that an optimizer may hold.
    """

    name: ModuleName
    padding: tuple[Pixels, Pixels]
    edit: Literal["padding"] = field(default="padding", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Set the padding."""
        module = model.get_submodule(self.name)
        if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
            raise PlanError(f"`{self.name}` is not a convolution that pads with zeros")
        height, width = self.padding
        module.padding = self.padding
        module._reversed_padding_repeated_twice = [width, width, height, height]


@dataclass(frozen=True)
class Attribute:
    """A whole number that a module holds, how many heads it has for instance, gets this value."""

    name: Owner
    attribute: ModuleName
    value: Whole
    edit: Literal["attribute"] = field(default="attribute", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Set the number."""
        module = model.get_submodule(self.name)
        if type(vars(module).get(self.attribute)) is not int:
            raise PlanError(f"`{self.name}` has no whole number {self.attribute!r:.80}")
        setattr(module, self.attribute, self.value)


@dataclass(frozen=True)
class Number:
    """A call in the forward of a module is given this number, -1 for a size that is whatever is left."""

    name: Owner
    written: Written
    value: Annotated[int, Bounds(-(2**24), 2**24)] | float
    edit: Literal["number"] = field(default="number", init=False, repr=False)

    def perform(self, model: nn.Module, whole: nn.Module | None = None) -> None:
        """Write the forward anew; the tensors of the whole model, of which this may be a part, bound the number."""
        if whole is None:
            whole = model
        if abs(self.value) > _MOST_TIMES * longest_axis(whole):
            raise PlanError(f"`{self.written.path[-1][0]:.80}`: {self.value} is more than any tensor has channels")
        write_number(model.get_submodule(self.name), self.written, self.value)


@dataclass(frozen=True)
class Sized:
    """A parameter or buffer gets this shape, wherever it is held; its numbers are not set.

    Sizes that the module holds beside it, such as `in_channels`, follow.
    """

    name: Owner
    attribute: ModuleName
    shape: Annotated[tuple[Whole, ...], Bounds(1, 16)]
    edit: Literal["tensor"] = field(default="tensor", init=False, repr=False)

    def __post_init__(self) -> None:
        if prod(self.shape) > _MOST_WEIGHTS:
            raise PlanError(f"`{self.name}.{self.attribute}`: a tensor of shape {self.shape} is too large")

    def perform(self, model: nn.Module) -> None:
        """Exchange the tensor."""
        resize_tensors(model, {f"{self.name}.{self.attribute}".lstrip("."): self.shape})


@dataclass(frozen=True)
class Dense:
    """An `nn.MultiheadAttention` becomes one whose heads may have another width together than what it reads."""

    name: Owner
    edit: Literal["attention"] = field(default="attention", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Change the layer, and let encoders around it keep to plain tensors."""
        module = model.get_submodule(self.name)
        if not isinstance(module, nn.MultiheadAttention) or not is_stock(module):
            raise PlanError(f"`{self.name}` is a {type(module).__name__}, not an nn.MultiheadAttention")
        make_dense(module)
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and module in set(encoder.modules()):
                encoder.use_nested_tensor = False


@dataclass(frozen=True)
class Partial:
    """An activation becomes a `PartialActivation` around itself."""

    name: ModuleName
    kept: Whole
    linear: Whole
    gate: Literal["", "separate", "packed"]
    channels_first: bool
    edit: Literal["partial"] = field(default="partial", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Wrap the activation."""
        f = model.get_submodule(self.name)
        partial = PartialActivation(f, self.kept, self.linear, gate=self.gate, channels_first=self.channels_first)
        _exchange(model, self.name, partial)


@dataclass(frozen=True)
class Slope:
    """An activation becomes a `SlopeActivation` around itself; its slope is not set.

    Attributes:
        width: channels with a slope each; 0 for one slope.
        dtype: of the slope. In a float64 model a float32 slope would be the least exact number of all.
    """

    name: ModuleName
    width: Whole
    family: Family
    target: Target
    channels_first: bool
    dtype: Literal["float32", "float64"]
    edit: Literal["slope"] = field(default="slope", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Wrap the activation."""
        f, width = model.get_submodule(self.name), self.width or None
        slope = SlopeActivation(
            f, width=width, family=self.family, target=self.target, channels_first=self.channels_first
        )
        slope.slope = nn.Parameter(slope.slope.detach().to(device_around(model, self.name), getattr(torch, self.dtype)))
        _exchange(model, self.name, slope)


@dataclass(frozen=True)
class Activation:
    """An activation with one parameter for each channel gets this many; the parameters are not set."""

    name: ModuleName
    channels: Size
    edit: Literal["activation"] = field(default="activation", init=False, repr=False)

    def perform(self, model: nn.Module) -> None:
        """Exchange the activation."""
        _exchange(model, self.name, narrowed_activation(model.get_submodule(self.name), self.channels))


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters and buffers of one module get these numbers. Not recorded: files hold a model's weights anyway.

    Attributes:
        name: of the module.
        tensors: by name, in the module's shapes and in any type; a linear map's weight in the logical orientation.
        as_held: whether a linear map's weight, too, is given in the orientation in which the module holds it.
    """

    name: Owner
    tensors: Mapping[str, Tensor]
    as_held: bool = False

    @torch.no_grad()
    def perform(self, model: nn.Module) -> None:
        """Copy the numbers."""
        module = model.get_submodule(self.name)
        own_weights(module)
        for name, numbers in self.tensors.items():
            logical = name == "weight" and kind_of(module) and not self.as_held
            own = weight_of(module) if logical else getattr(module, name, None)
            if not isinstance(own, Tensor) or own.shape != numbers.shape:
                found = tuple(own.shape) if isinstance(own, Tensor) else "no such tensor"
                raise PlanError(f"`{self.name}.{name}`: {found} cannot take numbers of shape {tuple(numbers.shape)}")
            # the type first: a device without float64 cannot take the wide ones
            own.copy_(numbers.to(own.dtype).to(own.device))


StructuralEdit = (
    Externalise
    | Resize
    | Norm
    | Identity
    | Doubled
    | Summand
    | Padding
    | Attribute
    | Entries
    | Absent
    | Number
    | Sized
    | Dense
    | Partial
    | Slope
    | Activation
)
"""The edits of a model's structure, which are recorded on it."""

Edit = StructuralEdit | Weights | Settings
"""One change of a model."""


def perform(model: nn.Module, edit: Edit) -> None:
    """Change `model` in place as one edit says, and record it.

    Raises:
        PlanError: the edit does not fit the model.
    """
    name = place_of(edit)
    before = model.get_submodule(name)
    edit.perform(model)
    if isinstance(edit, (Weights, Settings)):
        return
    changed = model.get_submodule(name)
    if changed is before:
        note(edit, changed, before)
    else:
        prefix, _, child = name.rpartition(".")
        note(edit, changed, before, model.get_submodule(prefix), child)


def edits(model: nn.Module) -> list[StructuralEdit]:
    """What surgery did to this model and its parts, in order; empty for a model it did not touch."""
    found = [_moved(edit, name, model) for name, edit in noted(model)]
    # entries of lists first: the names of all others are those that their modules have now
    return sorted(found, key=lambda edit: not isinstance(edit, Entries))


def _moved(edit: StructuralEdit, name: str, model: nn.Module) -> StructuralEdit:
    """The same edit of the module that stands at `name` now."""
    if isinstance(edit, Absent):
        return replace(edit, name=name, cache=getattr(model.get_submodule(name), "cache", -1))
    if isinstance(edit, Externalise):
        return replace(edit, module=name)
    return replace(edit, name=name)


def replay(model: nn.Module, edits: Sequence[StructuralEdit | Mapping[str, Any]]) -> nn.Module:
    """Give a fresh model the structure that another one has after surgery, in place.

    Works on the meta device; weights are not set and are loaded afterwards.

    Args:
        model: built as the original was before any surgery.
        edits: what `edits` returned, or their file form (`encoded`).

    Returns:
        `model`.

    Raises:
        CheckpointError: the list is malformed, or does not fit the model.
    """
    if not isinstance(edits, (list, tuple)):
        raise CheckpointError("the edits of a saved model are a list")
    for i, given in enumerate(edits):
        edit = given if isinstance(given, get_args(StructuralEdit)) else decoded(i, given)
        try:
            perform(model, edit)
        except (CheckpointError, OutOfMemoryError):
            raise
        except (ShallowerError, AttributeError, TypeError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"edit {i} ({edit.edit} at {place_of(edit) or 'the model'!r}) does not fit the model: {error}. "
                "Is this the architecture that was saved?"
            ) from error
    return model


def place_of(edit: Edit) -> str:
    """The dotted name of the module that an edit changes."""
    return edit.module if isinstance(edit, Externalise) else edit.name


def encoded(edit: StructuralEdit) -> dict[str, Any]:
    """An edit as it is written to a file: a flat object with its kind under "edit"."""
    data: dict[str, Any] = encode(edit)
    return data


def decoded(i: int, data: object) -> StructuralEdit:
    """The edit number `i` of a file.

    Raises:
        CheckpointError: it is malformed.
    """
    edit: StructuralEdit = decode(StructuralEdit, data, at=f"edit {i} of the saved model", error=CheckpointError)
    return edit
