"""The layers that are linear maps, read and rebuilt: `nn.Linear`, Transformers' transposed `Conv1D`, `nn.Conv2d`.

Weights are given in the logical orientation, (d_out, d_in) and for a convolution (d_out, d_in / groups, kh, kw).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.errors import PlanError
from shallower.modules.prepared.attention import DenseAttention, count_attention_anew
from shallower.modules.prepared.weight_norms import parametrizations_of, place_of_weight
from shallower.sites import LinearMap, Slot


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Transformers' `Conv1D`, a linear layer with a transposed weight."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def kind_of(module: nn.Module) -> str:
    """The `LinearMap.kind` of a module; "" if it is no linear map."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if is_conv1d(module):
        return "conv1d"
    return ""


def weight_of(module: nn.Module) -> Tensor:
    """The weight in logical orientation: a view of the module's own."""
    weight = cast("Tensor", module.weight).detach()
    if is_conv1d(module):
        return weight.t()
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias (d_out,), or None."""
    bias = cast("Tensor | None", module.bias)
    if bias is None:
        return None
    return bias.detach()


def normal_after(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, (n,) float64, of a BatchNorm's output: beta and |gamma|; else None."""
    if not isinstance(norm, _BatchNorm):
        return None
    if not norm.affine:
        return torch.zeros(norm.num_features).double(), torch.ones(norm.num_features).double()
    return norm.bias.detach().cpu().double(), norm.weight.detach().cpu().double().abs()


def check_shape(name: str, module: nn.Module, m: LinearMap) -> None:
    """Check that `module` is the map `m`.

    Raises:
        PlanError: it is another kind of layer, or has other sizes.
    """
    kind = kind_of(module)
    if kind != m.kind:
        raise PlanError(
            f"{name}: `{m.name}` is a {type(module).__name__}, and the plan was made for a {m.kind} layer. "
            "Is this the model that the plan was made for?"
        )
    weight = weight_of(module)
    kernel = _kernel_of(m)
    for what, planned, found in (
        ("input", m.d_in // m.groups, weight.shape[1]),
        ("output", m.d_out, weight.shape[0]),
        ("kernel", kernel, tuple(weight.shape[2:])),
    ):
        if planned != found:
            raise PlanError(
                f"the plan was made for {what} width {planned} at `{m.name}` of `{name}`, the model has {found}. "
                "Is this the model that the plan was made for?"
            )
    if isinstance(module, nn.Conv2d):
        present = geometry_of(module)
        odd = [
            f"{key} {value}, and it is {present[key]}" for key, value in _geometry(m).items() if value != present[key]
        ]
        if odd:
            raise PlanError(
                f"{name}: the plan was made for `{m.name}` with {'; '.join(odd)}. Find the sites again after moving "
                "padding"
            )
    if m.bias != (module.bias is not None):
        planned_bias, found_bias = ("with", "without") if m.bias else ("without", "with")
        raise PlanError(
            f"{name}: the plan was made for `{m.name}` {planned_bias} a bias, the model has it {found_bias}. Is this "
            "the model that the plan was made for?"
        )


def check_tensor(name: str, module: nn.Module, slot: Slot) -> None:
    """Check that a module holds the tensor in which channels of a site stand.

    Raises:
        PlanError: it does not, or the tensor has another shape.
    """
    tensor = getattr(module, slot.attribute, None)
    if not isinstance(tensor, Tensor):
        raise PlanError(f"{name}: the model has no tensor `{slot.tensor}`. Is this the model the plan was made for?")
    if tuple(tensor.shape) != slot.shape:
        raise PlanError(
            f"{name}: the plan was made for `{slot.tensor}` of shape {slot.shape}, and it has "
            f"{tuple(tensor.shape)}. Is this the model that the plan was made for?"
        )


def _kernel_of(m: LinearMap) -> tuple[int, ...]:
    """What the weight's shape has behind (d_out, d_in)."""
    if m.kind == "conv2d":
        return m.kernel
    return ()


def _geometry(m: LinearMap) -> dict[str, object]:
    return {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}


def geometry_of(module: nn.Conv2d) -> dict[str, object]:
    """Stride, padding, dilation and groups of a convolution; padding as zeros (or what else it pads with) on each side.

    With padding "same" and an even kernel, one side has one more.
    """
    padding: object = module.padding
    if isinstance(padding, str):
        half = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = {"same": tuple(half), "valid": (0, 0)}[padding]
    return {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}


def _pads_alike(module: nn.Conv2d, m: LinearMap) -> bool:
    """Whether `module` pads as `m` does; then it may stay in words ("same"), which say more for an even kernel."""
    window = (module.kernel_size, module.dilation) == (m.kernel, m.dilation)
    return window and geometry_of(module)["padding"] == m.padding


def resized(module: nn.Module, m: LinearMap) -> nn.Module:
    """A new layer with the sizes of `m` and unset weights; all else (dtype, device, requires_grad) is `module`'s.

    A subclass stays itself if its forward is the stock one, so that its class and attributes survive; else the result
    is the stock class.
    """
    weight, bias = cast("Tensor", module.weight), cast("Tensor | None", module.bias)
    shape: tuple[int, ...] = (m.d_out, m.d_in // m.groups, *_kernel_of(m))
    if isinstance(module, nn.Conv2d):
        layer: nn.Module = _bare(module, nn.Conv2d)
        settings = _convolution_settings(module, m)
    elif isinstance(module, nn.Linear):
        layer = _bare(module, nn.Linear)
        settings = {"in_features": m.d_in, "out_features": m.d_out}
    else:
        layer = copy.copy(module)
        shape = shape[::-1]
        settings = {"nf": m.d_out, "nx": m.d_in}
    for name, value in settings.items():
        setattr(layer, name, value)
    layer._parameters = dict(module._parameters)
    layer.weight = nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    trained = weight if bias is None else bias
    layer.register_parameter("bias", None)
    if m.bias:
        layer.bias = nn.Parameter(weight.new_empty(m.d_out), requires_grad=trained.requires_grad)
    return layer


def _convolution_settings(module: nn.Conv2d, m: LinearMap) -> dict[str, object]:
    """The attributes of a convolution with the sizes of `m`."""
    settings: dict[str, object] = {
        "in_channels": m.d_in,
        "out_channels": m.d_out,
        "kernel_size": m.kernel,
        "stride": m.stride,
        "dilation": m.dilation,
        "groups": m.groups,
    }
    if _pads_alike(module, m):
        settings["padding"] = module.padding
        settings["_reversed_padding_repeated_twice"] = module._reversed_padding_repeated_twice
    else:
        settings["padding"] = m.padding
        # of nn.Conv2d itself; read for padding modes other than zeros, which sites do not have
        settings["_reversed_padding_repeated_twice"] = [m.padding[1]] * 2 + [m.padding[0]] * 2
    return settings


def resized_norm(norm: nn.Module, channels: int) -> _BatchNorm:
    """A BatchNorm like `norm` with unset vectors of another width.

    Raises:
        PlanError: `norm` is no BatchNorm.
    """
    if not isinstance(norm, _BatchNorm):
        raise PlanError(f"a {type(norm).__name__} is not a BatchNorm and cannot be narrowed")
    layer = copy.copy(norm)
    layer.num_features = channels
    layer._parameters, layer._buffers = dict(norm._parameters), dict(norm._buffers)
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            empty = parameter.new_empty(channels)
            layer._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in norm._buffers.items():
        if buffer is not None:
            layer._buffers[name] = buffer.new_empty(channels) if buffer.dim() else buffer.clone()
    return layer


def _bare(module: nn.Module, stock: type[nn.Module]) -> nn.Module:
    """A copy of `module` that shares nothing it could change; of the stock class if its forward is another."""
    if type(module).forward is stock.forward and "forward" not in vars(module):
        return copy.copy(module)
    layer = stock.__new__(stock)
    nn.Module.__init__(layer)
    layer.training = module.training
    for name in ("padding_mode", "transposed", "output_padding"):
        if name in vars(module):
            setattr(layer, name, vars(module)[name])
    return layer


def is_the_map(module: nn.Module, m: LinearMap) -> bool:
    """Whether a layer has exactly the sizes of `m` already."""
    weight = weight_of(module)
    if tuple(weight.shape) != (m.d_out, m.d_in // m.groups, *_kernel_of(m)) or m.bias != (module.bias is not None):
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    return geometry_of(module) == _geometry(m)


def resize_tensors(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters and buffers new shapes, wherever a model holds them; their numbers are not set.

        resize_tensors(model, {"fc1.weight": (3, 8), "fc1.bias": (3,)})

    Sizes that layers hold beside them, such as `in_channels`, follow.

    Args:
        model: changed in place.
        shapes: of each tensor, by its dotted name.

    Raises:
        PlanError: there is no such tensor, or it has another number of dimensions.
    """
    made: dict[Tensor, Tensor] = {}
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        holder = model.get_submodule(owner)
        own = {**holder._parameters, **holder._buffers}.get(attribute)
        if own is None or own.dim() != len(shape):
            raise PlanError(f"`{owner}` has no tensor {attribute!r:.80} of {len(shape)} dimensions")
        made[own] = _of_shape(own, shape)
    changed: set[nn.Module] = set()
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor in made:
                    table[name] = made[tensor]
                    changed.add(module)
    for module in model.modules():
        if module in changed or not changed.isdisjoint(parametrizations_of(module).values()):
            count_anew(module)


def _of_shape(own: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor like another in everything but its shape."""
    made = own.new_empty(shape)
    if own.dim() == 4 and own.is_contiguous(memory_format=torch.channels_last) and not own.is_contiguous():
        made = made.contiguous(memory_format=torch.channels_last)
    if isinstance(own, nn.Parameter):
        return nn.Parameter(made, requires_grad=own.requires_grad)
    return made


def longest_axis(model: nn.Module) -> int:
    """The size of the longest axis of all parameters and buffers."""
    found = 0
    for tensor in (*model.parameters(), *model.buffers()):
        found = max(found, *tensor.shape, 0)
    return found


def count_anew(module: nn.Module) -> None:
    """Set the sizes that a layer holds beside its tensors to what these have now: `in_features`, `num_channels`, ..."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        _count_recurrent(module)
    if isinstance(module, DenseAttention):
        count_attention_anew(module)
    weight = getattr(*place_of_weight(module), None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    sizes: dict[str, object] = {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        sizes = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    elif isinstance(module, nn.modules.conv._ConvNd):
        sizes = {"in_channels": shape[1] * module.groups, "out_channels": shape[0]}
    elif is_conv1d(module):
        sizes = {"nx": shape[0], "nf": shape[1]}
    elif isinstance(module, nn.Embedding):
        sizes = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sizes = {"num_features": shape[0]}
    elif isinstance(module, nn.GroupNorm):
        sizes = {"num_channels": shape[0]}
    elif isinstance(vars(module).get("normalized_shape"), tuple):
        sizes = {"normalized_shape": shape}
    elif len(shape) == 2:
        sizes = {"in_features": shape[1], "out_features": shape[0]}
    for name, size in sizes.items():
        if name in vars(module):
            setattr(module, name, size)


ROWS_EACH = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many rows a channel of the state has in the weights of a recurrent layer, by its mode."""


def _count_recurrent(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Set the sizes of a recurrent layer, and the list of weights that it hands on."""
    if isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
        return
    weights = [getattr(module, name) for name in module._flat_weights_names]
    module.input_size, module.hidden_size = weights[0].shape[1], weights[0].shape[0] // ROWS_EACH[module.mode]
    if module.proj_size:
        module.proj_size = weights[1].shape[1]
    module._flat_weights = weights
    module._flat_weight_refs = [weakref.ref(weight) for weight in weights]
    if _shapes_fit(module):
        module.flatten_parameters()


def _shapes_fit(module: nn.RNNBase) -> bool:
    """Whether all weights of a recurrent layer have its sizes by now: cuDNN wants them side by side."""
    if module.proj_size >= module.hidden_size:  # which torch does not make
        return False
    fresh = nn.RNNBase(
        module.mode,
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        device="meta",
    )
    return all(own.shape == other.shape for own, other in zip(module.parameters(), fresh.parameters(), strict=True))
