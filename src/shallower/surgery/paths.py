"""The linear path of a step: which map takes the place of which layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.core.algebra import compose, norm_as_affine, response, scale_rows, ungrouped, wide
from shallower.errors import PlanError
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import Form
from shallower.sites import LinearMap, Site


@dataclass
class Path:
    """The linear path of a site, float64, and the consumers' biases with all other constants in them.

    y = consumer(kept channels) + ups[i] (down x + shift) + biases[i];  ups[i] is one full map where down is None.
    """

    down: Tensor | None
    shift: Tensor | None
    ups: list[Tensor]
    biases: list[Tensor]


def linear_path_of(model: nn.Module, entry: Entry, form: Form, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    """The linear path of an entry, and its constants where the form has them.

    Raises:
        PlanError: a constant would stand in front of zero padding.
    """
    if entry.fit is None:
        path = _through_fates(model, entry, form, producer, consumers)
    else:
        path = _fitted(entry.site, entry.fit, producer, consumers)
    if form.inside or path.shift is None:
        return path
    for i, (m, up) in enumerate(zip(entry.site.consumers, path.ups, strict=True)):
        _check_border(entry.site, m, path.shift)
        path.biases[i] = path.biases[i] + _answer_to_constants(entry.site, up, path.shift)
    path.shift = None
    return path


def _fitted(site: Site, fit: Fit, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    """The path of a fit."""
    where = wide(weight_of(producer)[:0]).device

    def own(tensor: Tensor) -> Tensor:
        return wide(tensor.to(where))

    biases = list(map(own, fit.biases))
    if not fit.ups:
        nothing = torch.zeros(0, dtype=torch.int64)
        down = torch.zeros((0, *_logical(producer).shape[1:]), dtype=torch.float64, device=where)
        return Path(down, None, [wide(columns_read(site, consumer, nothing)) for consumer in consumers], biases)
    path = Path(None, None, list(map(own, fit.ups)), biases)
    if fit.down is not None:
        path.down = own(fit.down)
    if fit.down_bias is not None:
        path.shift = own(fit.down_bias)
    return path


def _through_fates(model: nn.Module, entry: Entry, form: Form, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    """The path through the linear channels, as the consumers read them, and the constants of the dropped ones."""
    site, linear, dropped = entry.site, entry.linear, entry.dropped
    down, shift, constants = as_read(model, entry, producer, linear, dropped)
    path = Path(down, shift, [], [])
    for m, consumer in zip(site.consumers, consumers, strict=True):
        up, of_dropped = wide(columns_read(site, consumer, linear)), wide(columns_read(site, consumer, dropped))
        bias, own = down.new_zeros(up.shape[0]), bias_of(consumer)
        if own is not None:
            bias = wide(own)
        if form.constant:
            # in front of padding a constant is an image with a border: one channel of ones carries all of them
            up = torch.cat([up, _weighted(of_dropped, constants)], 1)
        else:
            _check_border(site, m, constants)
            bias = bias + _answer_to_constants(site, of_dropped, constants)
        path.ups.append(up)
        path.biases.append(bias)
    if form.constant:
        path.down = torch.cat([down, down.new_zeros(1, *down.shape[1:])])
        path.shift = torch.cat([shift, shift.new_ones(1)])
    return path


def as_read(
    model: nn.Module, entry: Entry, producer: nn.Module, linear: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and shifts of the linear channels, and constants of the dropped ones, all as the consumers read them.

    With the first BatchNorm h -> b h + c, the line h -> s h + t and the second BatchNorm z -> a z + e, a channel is
    a (s (b (p x + q) + c) + t) + e, and a constant t is a t + e.
    """
    site = entry.site
    rows = site.bridge.up_rows(linear)
    down = wide(_logical(producer)[rows])
    shift, bias = down.new_zeros(len(linear)), bias_of(producer)
    if bias is not None:
        shift = wide(bias[rows])
    gain = torch.ones_like(shift)
    before = affine(model, site.bridge.norm_before)
    if before is not None:
        gain, shift = before[0][linear], shift * before[0][linear] + before[1][linear]
    slopes, offsets = entry.slopes.to(down.device), entry.offsets.to(down.device)
    gain, shift = slopes[linear] * gain, slopes[linear] * shift + offsets[linear]
    constants = offsets[dropped]
    if not site.bridge.has("depthwise"):  # else the constant is what the consumers read
        after = affine(model, site.bridge.norm_after)
        if after is not None:
            gain, shift = gain * after[0][linear], shift * after[0][linear] + after[1][linear]
            constants = constants * after[0][dropped] + after[1][dropped]
    return scale_rows(down, gain), shift, constants


def _answer_to_constants(site: Site, columns: Tensor, constants: Tensor) -> Tensor:
    """What columns of a consumer give for constant channels."""
    return response(columns, constants.repeat_interleave(site.bridge.block))


def _weighted(columns: Tensor, constants: Tensor) -> Tensor:
    """The one column that does with a channel of ones what these columns do with constants."""
    shape = (1, -1, *[1] * (columns.dim() - 2))
    return (columns * constants.reshape(shape)).sum(1, keepdim=True)


def product_of(up: Tensor, down: Tensor | None, producer: nn.Module, consumer: nn.Module) -> Tensor:
    """The map of a consumer after that of a producer; `up` itself where it is one full map."""
    if down is None:
        return up
    if isinstance(producer, nn.Conv2d) and not isinstance(consumer, nn.Conv2d):
        return compose(up, down.flatten(1))  # 1x1, behind an average over all pixels
    if not isinstance(producer, nn.Conv2d) or not isinstance(consumer, nn.Conv2d):
        return compose(up, down)
    return compose(
        up,
        down,
        stride=cast("tuple[int, int]", producer.stride),
        inner_dilation=cast("tuple[int, int]", producer.dilation),
        outer_dilation=cast("tuple[int, int]", consumer.dilation),
    )


def _logical(module: nn.Module) -> Tensor:
    """The weight with all input channels, also of a grouped convolution."""
    weight = weight_of(module)
    if isinstance(module, nn.Conv2d):
        return ungrouped(weight, module.groups)
    return weight


def columns_read(site: Site, consumer: nn.Module, channels: Tensor) -> Tensor:
    """The columns of a consumer that read these channels of its site."""
    weight = _logical(consumer)
    return weight[:, site.bridge.columns(channels).to(weight.device)]


def affine(model: nn.Module, norm: str) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a BatchNorm, by name."""
    if not norm:
        return None
    module = model.get_submodule(norm)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        raise PlanError(f"`{norm}` is not a BatchNorm with running statistics")
    with torch.no_grad():
        return norm_as_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def _check_border(site: Site, consumer: LinearMap, *constants: Tensor) -> None:
    if not site.bridge.pads([consumer]):
        return
    for constant in constants:
        # what rounding leaves of an offset that was chosen so that the norm maps it to zero
        if not constant.is_meta and bool((constant.abs() > 1e-12).any()):
            raise PlanError(
                f"{site.name}: `{consumer.name}` pads with zeros, so that a constant in its input (a bias, an offset "
                "or a BatchNorm shift) would be wrong along the border. Choose offsets that make it zero, or keep the "
                "channels"
            )
