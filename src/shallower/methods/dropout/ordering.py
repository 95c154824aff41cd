"""Which channels of a site matter most, and the network with its channels in that order.

    orders = by_elimination(model, sites, batches)
    permute(model, site, orders[site.name])         # computes what it computed

A prefix of the channels is then the best choice of so many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Gram
from shallower.calibrating.patches import check_mask, flat, flat_mask, unmasked
from shallower.calibrating.selection import eliminate
from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.processes import raised_anywhere
from shallower.core.watching import read, watching
from shallower.errors import FitError
from shallower.methods.dropout.prefix import RowBlock, prefix, produced
from shallower.modules.layers import weight_of
from shallower.sites import Site, Sites, Slot

_RIDGE = 1e-4


def by_magnitude(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """For each site, (n,) int64: its channels, those with the largest weights first; see `magnitudes`."""
    orders = {}
    for name, size in magnitudes(model, sites).items():
        orders[name] = size.argsort(descending=True, stable=True)
    return orders


def magnitudes(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """For each site, (n,) float64: the sizes of its channels.

    The size of a channel is the product of the norms of its rows, of a BatchNorm's scale and of its columns.
    """
    sizes = {}
    for site in sites:
        size = torch.ones(site.width, dtype=torch.float64)
        for name, blocks in produced(site):
            weight = weight_of(model.get_submodule(name)).double().cpu()
            size *= torch.stack([_norms_of_rows(weight, block, site.width) for block in blocks]).norm(dim=0)
        for depthwise in site.bridge.depthwise:
            size *= weight_of(model.get_submodule(depthwise.name)).double().cpu().flatten(1).norm(dim=1)
        for name in site.bridge.norms:
            norm: Any = model.get_submodule(name)
            scale, var = norm.weight, cast("Tensor | None", norm.running_var)
            if scale is not None and var is not None:
                size *= cast("Tensor", scale).detach().double().cpu().abs() / (var.double().cpu() + norm.eps).sqrt()
        sizes[site.name] = size * _norms_of_columns(model, site)
    return sizes


def by_elimination(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, Tensor]:
    """For each site, (n,) int64: its channels, the one that would be missed most first.

    Where the consumers are linear layers, channels are eliminated one after another: the one without which least
    squares predicts the consumers' outputs hardly worse goes first, and stands last. Behind convolutions and for heads
    a channel counts by the energy of what it gives to the consumers, E[z^2] |C|^2. Of several processes all call it,
    each with batches of its own, and the order is the same in all.

    Args:
        model: left as it was.
        sites: of this model.
        batches: a few hundred samples; read once.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.

    Raises:
        FitError: there are no batches, an activation is not finite, or a mask is of other positions.
    """
    with raised_anywhere():
        grams = _grams(model, sites, Batches.read(batches, inputs_of, mask_of))
    orders = {}
    for site in sites:
        gram = grams[site.name]
        if not gram.is_finite():
            raise FitError(f"{site.name}: the channels are not finite on these batches")
        moments = gram.centred(intercept=False)
        if gram.columns:
            columns = torch.cat([_wide_weight(model, m.name) for m in site.consumers]).to(moments.zz)
            gone = eliminate(moments.zz, moments.zz @ columns.t(), ridge=_RIDGE, keep=1).order
            left = torch.ones(site.width, dtype=torch.bool)
            left[gone.cpu()] = False
            orders[site.name] = torch.cat([left.nonzero().flatten(), gone.cpu().flip(0)])
        else:
            each = site.bridge.block
            energy = (moments.yy.cpu() * _column_squares(model, site)).view(site.width, each).sum(1)
            orders[site.name] = energy.argsort(descending=True, stable=True)
    return orders


@torch.no_grad()
def permute(model: nn.Module, site: Site, order: Tensor) -> None:
    """Reorder the channels of a site in place; the model computes what it computed.

    Args:
        model: whose weights are changed.
        site: of this model.
        order: (n,) int64; channel j of the result is channel order[j].

    Raises:
        FitError: `order` does not name every channel once.
    """
    if order.dim() != 1 or not torch.equal(order.cpu().sort().values, torch.arange(site.width)):
        raise FitError(f"{site.name}: an order names each of the {site.width} channels once")
    if site.followed:
        for slot in site.slots:
            _reorder_along(model.get_submodule(slot.module), slot, order.cpu())
        return
    for made, blocks in produced(site):
        module = model.get_submodule(made)
        for start, step in blocks:
            rows = start + _block_rows(order, step)
            for tensor in (weight_of(module), cast("Tensor | None", module.bias)):
                if tensor is not None:
                    tensor.detach()[start : start + site.width * step] = tensor.detach()[rows.to(tensor.device)]
    names = [depthwise.name for depthwise in site.bridge.depthwise]
    names += site.bridge.norms
    names += (place.module for place in site.bridge.activations if not place.calls)
    for name in names:
        _reorder(model.get_submodule(name), site.width, order)
    columns = site.bridge.columns(order)
    for m in site.consumers:
        weight = weight_of(model.get_submodule(m.name))
        weight.copy_(weight[:, columns.to(weight.device)].clone())


def _reorder_along(module: nn.Module, slot: Slot, order: Tensor) -> None:
    """Move every channel's positions along one axis of one tensor."""
    tensor = cast("Tensor", getattr(module, slot.attribute)).detach()
    source = torch.arange(tensor.shape[slot.axis])
    for channel, other in enumerate(order):
        source[slot.positions(torch.tensor([channel]))] = slot.positions(other[None])
    tensor.copy_(tensor.index_select(slot.axis, source.to(tensor.device)))


def _reorder(module: nn.Module, width: int, order: Tensor) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() and tensor.shape[0] == width > 1:
            tensor.detach().copy_(tensor.detach()[order.to(tensor.device)].clone())


def _block_rows(order: Tensor, each: int) -> Tensor:
    """Indices of the rows, `each` for a channel."""
    return (order.cpu()[:, None] * each + torch.arange(each)).flatten()


def _norms_of_rows(weight: Tensor, block: RowBlock, width: int) -> Tensor:
    rows = prefix(weight, [block], width).reshape(width, -1)
    return rows.square().sum(1).sqrt()


def _wide_weight(model: nn.Module, name: str) -> Tensor:
    return weight_of(model.get_submodule(name)).double()


def _column_squares(model: nn.Module, site: Site) -> Tensor:
    """For each column of the consumers, the sum of its squares, (n * block,)."""
    squares = [_wide_weight(model, m.name).square().transpose(0, 1).flatten(1).sum(1).cpu() for m in site.consumers]
    return torch.stack(squares).sum(0)


def _norms_of_columns(model: nn.Module, site: Site) -> Tensor:
    return _column_squares(model, site).view(site.width, site.bridge.block).sum(1).sqrt()


def _grams(model: nn.Module, sites: Sites, batches: Batches) -> dict[str, Gram]:
    """Moments of what consumers read: its columns where channels are eliminated, else outputs, whose squares count.

    Raises:
        FitError: there are no batches, or a mask is of other positions.
    """
    device = model_device(model)
    reads = {site.name: _Reads(site, device) for site in sites}
    before = {site.consumers[0].name: reads[site.name] for site in sites}
    with evaluating(model), watching(model, before=before):
        for batch in batches:
            here = batch.on(device)
            rows: set[int] = set()
            for each in reads.values():
                each.mask, each.rows = flat_mask(here.mask), rows
            call(model, here.inputs)
            check_mask(here, rows)
    grams: dict[str, Gram] = {}
    for name, each in reads.items():
        grams[name] = each.gram.over_processes()
        if not grams[name].count:
            raise FitError("the order of channels needs data: `batches` is empty. Use a few hundred samples")
    return grams


class _Reads:
    """Second moments of what a consumer reads, over batches."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self.channels_first = site.bridge.dim == 1
        self.eliminated = not site.followed and not self.channels_first
        self.mask: Tensor | None = None
        self.rows: set[int] = set()
        columns = site.consumers[0].d_in
        self.gram = Gram(0, columns, device=device)
        if self.eliminated:
            self.gram = Gram(columns, 0, device=device)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = flat(read(args, kwargs).detach(), self.channels_first)
        self.rows.add(len(z))
        z = unmasked(z, self.mask)
        if self.eliminated:
            self.gram = self.gram.seen(z, z[:, :0])
        else:
            self.gram = self.gram.seen(z[:, :0], z)
