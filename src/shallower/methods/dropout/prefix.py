"""Layers that compute with the first channels of a site only, and leave the rest of their weights alone.

    widths = {site.name: Width(site.width) for site in sites}
    places = attach_prefix(model, sites, widths)
    widths["head"].live = 128           # the next forward pass in eval mode computes 128 channels

What is attached shares its parameters, buffers and hooks with the layer that stood there: names in the `state_dict`
stay, and detaching gives back the layer with the weights as they are. Only the maps that produce the channels know
the width; everything behind them follows the shape of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.errors import MethodError, Refusal
from shallower.modules import attachment
from shallower.modules.layers import bias_of, is_conv1d
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.sites import Follower, Place, Site, Sites

RowBlock = tuple[int, int]
"""(start, step): k channels are the rows start, ..., start + k step - 1 of a map."""


class Width:
    """How many channels of a site are computed: `drawn` while training, `live` in eval mode."""

    def __init__(self, full: int) -> None:
        self.full = self.live = self.drawn = full

    def now(self, training: bool) -> int:
        """The width in this mode."""
        if training:
            return self.drawn
        return self.live


def attach_prefix(
    model: nn.Module, sites: Iterable[Site], widths: Mapping[str, Width], *, rescale: float = 1.0
) -> list[Place]:
    """Make the layers of some sites compute with the first channels only.

    Args:
        model: to attach to.
        sites: whose channels may be kept one by one.
        widths: say how many, by the name of the site; shared by all layers of a site.
        rescale: multiply what the consumers read by (n / k) to this power, behind the BatchNorms.

    Returns:
        Where something was attached.

    Raises:
        MethodError: a BatchNorm is synchronised between processes, it is not known how the channels of an activation
            are counted, or something is attached there already.
    """
    places: list[Place] = []
    try:
        for site in sites:
            _attach(model, site, widths[site.name], rescale, places)
    except Exception:
        attachment.detach(model, places)
        raise
    return places


def _attach(model: nn.Module, site: Site, width: Width, rescale: float, places: list[Place]) -> None:
    def put(place: Place, make: Callable[[nn.Module], nn.Module]) -> None:
        attachment.attach(model, place, make)
        places.append(place)

    def map_at(name: str) -> PrefixMap:
        place = Place(name)
        if place not in places:
            put(place, lambda layer: _view(layer, PrefixMap))
        return cast("PrefixMap", model.get_submodule(name))

    for name in dict.fromkeys(follower.module for follower in site.followers):
        own = [follower for follower in site.followers if follower.module == name]
        put(Place(name), partial(_counting, followers=own, width=width))
    for name, blocks in produced(site):
        module = map_at(name)
        if module.prefix_rows is not None:
            raise MethodError(f"{site.name}: `{name}` gives another site's channels too; leave one of the two out")
        module.prefix_rows = _Rows(width, blocks)
    for depthwise in site.bridge.depthwise:
        put(Place(depthwise.name), lambda layer: _view(layer, _PrefixDepthwise))
    for name in site.bridge.norms:
        put(Place(name), partial(_prefix_norm, name=name))
    for place in site.bridge.activations:
        if _stands_in_the_way(model, place, site):
            put(place, lambda f: _narrower_activation(f, site))
    for m in site.consumers:
        map_at(m.name).rescale = rescale


def check_free(model: nn.Module, sites: Sites) -> None:
    """Check that no method is attached at these sites, before anything is changed."""
    taken = set(attachment.attached_places(model))
    for site in sites:
        places = [site.activation, *(Place(m.name) for m in site.maps)]
        if taken.intersection(places):
            raise MethodError(
                f"{site.name}: a method is attached here already; leave the site out, or detach the earlier method "
                "first (method.detach())"
            )


def entry_at(model: nn.Module, site: Site, k: int, rescale: float) -> Entry:
    """The plan's entry that keeps the first k channels of a site, as the live model computes them at that width.

    Args:
        model: with `attach_prefix` done.
        site: of the model.
        k: channels that stay.
        rescale: (n / k) to this power is folded into the consumers.
    """
    kept = torch.arange(k)
    if not rescale and not _adds_behind(site):
        return Entry.narrow(site, kept)
    # A fit, and not a narrowing with constants: what a BatchNorm makes of a channel that is not there is not added.
    scale, columns = (site.width / k) ** rescale, k * site.bridge.block
    weights, biases = [], []
    for m in site.consumers:
        layer = cast("PrefixMap", model.get_submodule(m.name))
        weight, bias = layer.logical_weight.detach()[:, :columns] * scale, bias_of(layer)
        weights.append(weight)
        biases.append(weight.new_zeros(len(weight)) if bias is None else bias.clone())
    return Entry.narrow(site, kept, fit=Fit(tuple(weights), tuple(biases)))


def _adds_behind(site: Site) -> bool:
    """Whether a norm or a depthwise convolution behind the activation makes something of a channel that is zero."""
    kinds = [stage.kind for stage in site.bridge.stages]
    if "activation" not in kinds:
        return False
    behind = kinds[kinds.index("activation") :]
    return "norm" in behind or "depthwise" in behind


def produced(site: Site) -> list[tuple[str, tuple[RowBlock, ...]]]:
    """The maps that give a site's channels, by name, each with the rows that belong to them."""
    maps: list[tuple[str, tuple[RowBlock, ...]]] = []
    for slot in site.slots:
        if slot.side == "rows" and slot.attribute == "weight":
            rows = [(s.start + i * s.stride, s.block) for s in slot.spans for i in range(s.repeats)]
            maps.append((slot.module, tuple(sorted(rows))))
    if site.gate is not None:
        maps.append((site.gate.name, ((0, 1),)))
    if site.producer is not None:
        blocks: tuple[RowBlock, ...] = ((0, 1),)
        if site.bridge.packed:
            blocks = ((0, 1), (site.width, 1))
        maps.append((site.producer.name, blocks))
    return maps


def not_computed(site: Site) -> Refusal | None:
    """Why the first channels of a site alone cannot be computed; None where they can."""
    if site.bridge.not_narrow is not None or not site.followed:
        return site.bridge.not_narrow
    for follower in site.followers:
        if follower.written is not None:
            return Refusal(f"the forward of `{follower.module}` writes out a number that training cannot change")
    plain = {name for name, _ in produced(site)} | {m.name for m in site.consumers}
    for slot in site.slots:
        if slot.module not in plain or slot.attribute not in ("weight", "bias"):
            return Refusal(f"`{slot.tensor}` holds its channels too, and only linear layers are narrowed in training")
    if site.averages or not site.consumers:
        return Refusal("its channels are read by other than plain linear layers")
    return None


@dataclass
class _Rows:
    width: Width
    blocks: tuple[RowBlock, ...]


class PrefixMap(nn.Module):
    """A linear map of which the first output channels, or input channels, are computed.

    It may be the producer of one site and the consumer of another.
    """

    prefix_rows: _Rows | None = None
    rescale = 0.0

    @property
    def logical_weight(self) -> Tensor:
        """(d_out, d_in), or (d_out, d_in, kh, kw)."""
        weight = cast("Tensor", self.weight)
        if is_conv1d(self):
            return weight.t()
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """x with any number of the input channels from the first; the result has the site's width."""
        x = input
        weight, bias = self._rows()
        is_convolution = weight.dim() == 4
        channels = x.shape[1] if is_convolution else x.shape[-1]
        full = weight.shape[1]
        if channels < full:
            weight = weight[:, :channels]
            if self.rescale:
                weight = weight * (full / channels) ** self.rescale
        if is_convolution:
            return F.conv2d(x, weight, bias, **_conv_geometry(self), groups=cast("int", self.groups))
        return F.linear(x, weight, bias)

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the output channels that are computed."""
        weight, bias = self.logical_weight, cast("Tensor | None", self.bias)
        if self.prefix_rows is None:
            return weight, bias
        width, blocks = self.prefix_rows.width, self.prefix_rows.blocks
        k = width.now(self.training)
        if k == width.full:
            return weight, bias
        if bias is not None:
            bias = prefix(bias, blocks, k)
        return prefix(weight, blocks, k), bias


class _PrefixDepthwise(nn.Module):
    """A depthwise convolution of as many channels as come in."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        channels = x.shape[1]
        weight, bias = _first_channels(self.weight, channels), _first_channels(self.bias, channels)
        return F.conv2d(x, cast("Tensor", weight), bias, **_conv_geometry(self), groups=channels)


def _conv_geometry(module: nn.Module) -> dict[str, Any]:
    return {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}


def prefix(tensor: Tensor, blocks: Sequence[RowBlock], k: int) -> Tensor:
    """The rows of the first k channels: a view where they are one block."""
    parts = [tensor[start : start + k * step] for start, step in blocks]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)


class _PrefixNorm(nn.Module):
    """A BatchNorm of as many channels as come in."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        channels = x.shape[1]
        mean, var = _first_channels(self.running_mean, channels), _first_channels(self.running_var, channels)
        by_batch = self.training or (mean is None and var is None)
        momentum = cast("float | None", self.momentum)
        if self.training and not self.track_running_stats:
            mean = var = None
        elif self.training and self.num_batches_tracked is not None:
            count = cast("Tensor", self.num_batches_tracked)
            count.add_(1)
            if momentum is None:  # a cumulative mean
                momentum = 1.0 / float(count)
        weight, bias = _first_channels(self.weight, channels), _first_channels(self.bias, channels)
        return F.batch_norm(x, mean, var, weight, bias, by_batch, momentum or 0.0, cast("float", self.eps))


class _PrefixVectors(nn.Module):
    """A module with vectors of one number for each channel, on as many channels as come in."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        (original,), full, dim = cast("tuple[list[nn.Module], int, int]", self.prefix_of)
        channels = x.shape[dim]
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        own = dict(tensors)
        for name, tensor in tensors.items():
            if tensor.dim() and tensor.shape[0] == full:
                own[name] = tensor[:channels]
        original.training = self.training
        for name in ("momentum", "track_running_stats"):
            if name in vars(self):
                setattr(original, name, getattr(self, name))
        return cast("Tensor", functional_call(original, own, (x,)))


def _first_channels(vector: Any, channels: int) -> Tensor | None:
    if vector is None:
        return None
    return cast("Tensor", vector)[:channels]


def _prefix_norm(norm: nn.Module, name: str) -> nn.Module:
    if isinstance(norm, nn.SyncBatchNorm) or not isinstance(norm, _BatchNorm):
        raise MethodError(
            f"`{name}` is a {type(norm).__name__}, of which the first channels alone are not computed here; train with "
            "nn.BatchNorm (each process on its own statistics), or leave the site out"
        )
    # a norm that does more (timm's, with an activation inside) keeps its own forward
    if type(norm).forward is _BatchNorm.forward:
        return _view(norm, _PrefixNorm)
    return _with_vectors(norm, norm.num_features, 1)


def _stands_in_the_way(model: nn.Module, place: Place, site: Site) -> bool:
    """Whether something has to stand at the activation: parameters of its own, or a fused path that would be taken."""
    owner = place.module
    if not place.calls:
        owner = owner.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.TransformerEncoderLayer):
        return True
    if place.calls:
        return False
    return _has_channels(model.get_submodule(place.module), site)


def _has_channels(f: nn.Module, site: Site) -> bool:
    """Whether an activation has parameters of its own for each channel."""
    return any(p.numel() == site.width > 1 for p in f.parameters())


def _narrower_activation(f: nn.Module, site: Site) -> nn.Module:
    if not _has_channels(f, site):
        return f
    if not isinstance(f, nn.PReLU) and not hasattr(f, "slope"):
        raise MethodError(f"{site.name}: it is not known how the channels of a {type(f).__name__} are counted")
    return _with_vectors(f, site.width, site.bridge.dim)


def _with_vectors(original: nn.Module, width: int, dim: int) -> nn.Module:
    view = _view(original, _PrefixVectors)
    # in a list: it shares its parameters with the view, and is no child of it
    vars(view)["prefix_of"] = ([original], width, dim)
    return view


def _counting(module: nn.Module, followers: Sequence[Follower], width: Width) -> nn.Module:
    """A module whose forward finds as many channels as are computed in its own attributes."""
    if "forward" in vars(module):
        raise MethodError(
            f"`{followers[0].module}`: its forward has been replaced on the instance, and the number of heads cannot "
            "change under it; leave the site out"
        )
    view = _view(module, _PrefixCounts)
    whole = {f.attribute: (getattr(module, f.attribute), f.each) for f in followers}
    vars(view)["prefix_counts"] = (width, whole)
    return view


class _PrefixCounts(nn.Module):
    """A module whose forward finds as many channels as are computed in its own attributes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        width, counts = cast("tuple[Width, dict[str, tuple[int, int]]]", self.prefix_counts)
        gone = width.full - width.now(self.training)
        for name, (whole, each) in counts.items():
            setattr(self, name, whole - each * gone)
        return super().forward(*args, **kwargs)  # of the class that it is a view of


def _view(original: nn.Module, behaviour: type[nn.Module]) -> nn.Module:
    """The same layer with another forward: of its class, and with its parameters, buffers, children and hooks."""
    kinds: tuple[type[nn.Module], type[nn.Module]] = (behaviour, type(original))
    if kinds not in _CLASSES:
        _CLASSES[kinds] = type(f"Prefix{kinds[1].__name__}", kinds, {})
    view = object.__new__(_CLASSES[kinds])
    vars(view).update(vars(original))
    return view


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
