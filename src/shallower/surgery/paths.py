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
from shallower.planning.form import Form
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


def path_of(model: nn.Module, entry: Entry, form: Form, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    path = (
        _chosen(model, entry, form, producer, consumers) if entry.fit is None else _fitted(entry, producer, consumers)
    )
    if not form.inside and path.shift is not None:
        for i, (m, up) in enumerate(zip(entry.site.consumers, path.ups, strict=True)):
            _check_border(entry.site, m, path.shift)
            path.biases[i] = path.biases[i] + _answer(entry.site, up, path.shift)
        path.shift = None
    return path


def _fitted(entry: Entry, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    """The path of a fit."""
    fit = cast("Fit", entry.fit)
    where = wide(weight_of(producer)[:0]).device
    ups = [wide(up.to(where)) for up in fit.ups]
    down = None if fit.down is None else wide(fit.down.to(where))
    shift = None if fit.down_bias is None else wide(fit.down_bias.to(where))
    if not fit.ups:
        down = torch.zeros((0, *_logical(producer).shape[1:]), dtype=torch.float64, device=where)
        ups = [wide(columns_of(entry.site, c, torch.zeros(0, dtype=torch.int64))) for c in consumers]
    return Path(down, shift, ups, [wide(bias.to(where)) for bias in fit.biases])


def _chosen(model: nn.Module, entry: Entry, form: Form, producer: nn.Module, consumers: list[nn.Module]) -> Path:
    """The path through the linear channels, as the consumers read them, and the constants of the dropped ones."""
    site, linear, dropped = entry.site, entry.linear, entry.dropped
    down, shift, constants = as_read(model, entry, producer, linear, dropped)
    ups, biases = [], []
    for m, consumer in zip(site.consumers, consumers, strict=True):
        ups.append(wide(columns_of(site, consumer, linear)))
        of_dropped = _answer(site, wide(columns_of(site, consumer, dropped)), constants)
        own = bias_of(consumer)
        bias = of_dropped.new_zeros(len(of_dropped)) if own is None else wide(own)
        if form.constant:
            # in front of padding a constant is an image with a border: one channel of ones carries all of them
            ups[-1] = torch.cat([ups[-1], _weighted(wide(columns_of(site, consumer, dropped)), constants)], 1)
        else:
            _check_border(site, m, constants)
            bias = bias + of_dropped
        biases.append(bias)
    if form.constant:
        down = torch.cat([down, down.new_zeros(1, *down.shape[1:])])
        shift = torch.cat([shift, shift.new_ones(1)])
    return Path(down, shift, ups, biases)


def as_read(
    model: nn.Module, entry: Entry, producer: nn.Module, linear: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and shifts of the linear channels, and constants of the dropped ones, all as the consumers read them.

    Everything between is in them: both BatchNorms, slopes and offsets.
    """
    site = entry.site
    before, after = affine(model, site.norm_before), None if site.between else affine(model, site.norm_after)
    rows = up_rows_of(site, linear)
    down = wide(_logical(producer)[rows])
    bias = bias_of(producer)
    shift = down.new_zeros(len(linear)) if bias is None else wide(bias[rows])
    gain = entry.slopes.to(down.device)[linear]
    if before is not None:
        shift = shift * before[0][linear] + before[1][linear]
    offsets = entry.offsets.to(down.device)
    shift, constants = gain * shift + offsets[linear], offsets[dropped]
    if before is not None:
        gain = gain * before[0][linear]
    if after is not None:
        gain = gain * after[0][linear]
        shift = shift * after[0][linear] + after[1][linear]
        constants = constants * after[0][dropped] + after[1][dropped]
    return scale_rows(down, gain), shift, constants


def _answer(site: Site, columns: Tensor, constants: Tensor) -> Tensor:
    """What columns of a consumer give for constant channels."""
    return response(columns, constants.repeat_interleave(site.block))


def _weighted(columns: Tensor, constants: Tensor) -> Tensor:
    """The one column that does with a channel of ones what these columns do with constants."""
    shape = (1, -1, *[1] * (columns.dim() - 2))
    return (columns * constants.reshape(shape)).sum(1, keepdim=True)


def composed(up: Tensor, down: Tensor | None, producer: nn.Module, consumer: nn.Module) -> Tensor:
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
    return ungrouped(weight, module.groups) if isinstance(module, nn.Conv2d) else weight


def columns_of(site: Site, consumer: nn.Module, channels: Tensor) -> Tensor:
    """The columns of a consumer that read these channels of its site."""
    weight = _logical(consumer)
    columns = (channels.cpu()[:, None] * site.block + torch.arange(site.block)).flatten()
    return weight[:, columns.to(weight.device)]


def up_rows_of(site: Site, channels: Tensor) -> Tensor:
    """Rows of the producer that give these channels of the up projection."""
    return channels + site.width if site.packed == "gate-first" else channels


def gate_rows_of(site: Site, channels: Tensor) -> Tensor:
    """Rows of a packed producer that give these channels of the gate."""
    return channels + site.width if site.packed == "up-first" else channels


def affine(model: nn.Module, norm: str) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a BatchNorm, by name."""
    if not norm:
        return None
    module = model.get_submodule(norm)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        raise PlanError(f"`{norm}` is not a BatchNorm with running statistics")
    weight = None if module.weight is None else module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return norm_as_affine(module.running_mean, module.running_var, weight, bias, module.eps)


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
