"""The layers of one site, with the channels that stay alone: run, and differentiated by the producers' weights.

    layers = SiteLayers.of(model, site, kept)
    z = layers.hidden(x)                                    # what the consumers read
    z, slopes, later = layers.linearised(x)
    layers.change(x, slopes, later, deltas)                 # by how much z changes to first order

Everything is in float32. What stands between the producers and the consumers is taken from `site.bridge`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.calibrating.patches import unusual_padding
from shallower.core.algebra import norm_as_affine
from shallower.modules import attachment
from shallower.modules.layers import bias_of, weight_of
from shallower.sites import LinearMap, Place, Site

Deltas = Mapping[str, Tensor]
"""By name ("producer", "gate", "path"): (kept, columns [+ 1]), changes of a map's rows, and of its bias in the last
column."""


@dataclass(frozen=True)
class Affine:
    """scale * h + shift for each channel: a BatchNorm in eval mode.

    Attributes:
        scale, shift: (kept,); None for 1 and 0.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        """The output."""
        h = self.change(h)
        if self.shift is None:
            return h
        return h + vector(self.shift, h)

    def change(self, h: Tensor) -> Tensor:
        """The change of the output with a change of the input."""
        if self.scale is None:
            return h
        return h * vector(self.scale, h)


@dataclass(frozen=True)
class Depthwise:
    """A convolution of each channel by itself.

    Attributes:
        map: its geometry.
        weight: (kept, 1, kh, kw).
        bias: (kept,), or None.
    """

    map: LinearMap
    weight: Tensor
    bias: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        """The output."""
        h = self.change(h)
        if self.bias is None:
            return h
        return h + vector(self.bias, h)

    def change(self, h: Tensor) -> Tensor:
        """The change of the output with a change of the input."""
        m = self.map
        return F.conv2d(h, self.weight, None, m.stride, m.padding, m.dilation, groups=h.shape[1])


@dataclass(frozen=True)
class Pointwise:
    """An activation.

    Attributes:
        f: takes and returns the kept channels.
    """

    f: Callable[[Tensor], Tensor]

    def __call__(self, h: Tensor) -> Tensor:
        """f(h)."""
        return self.f(h)

    def sloped(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """f(h) and f'(h)."""
        with torch.enable_grad():
            given = h.detach().requires_grad_()
            z = self.f(given)
            (slope,) = torch.autograd.grad(z.sum(), given)
        return z.detach(), slope


@dataclass(frozen=True)
class Producer:
    """A map into the hidden tensor, its kept rows only: h = scale * (weight x) + shift.

    Attributes:
        map: its geometry.
        weight: (kept, d_in) or (kept, d_in, kh, kw).
        scale: (kept,) of a BatchNorm behind it; None for 1.
        shift: (kept,) of the BatchNorm or the bias; None for 0.
        held: (kept,) that bias, or the BatchNorm's shift; None where there is none.
    """

    map: LinearMap
    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    held: Tensor | None = None

    @property
    def free(self) -> bool:
        """Whether the shift may change: there is something to hold it."""
        return self.held is not None

    @property
    def columns(self) -> int:
        """Numbers that one row of the map has."""
        return self.weight[0].numel()

    @property
    def unknowns(self) -> tuple[int, int]:
        """The shape of a change: rows, and columns with that of the shift."""
        return len(self.weight), self.columns + self.free

    def __call__(self, x: Tensor) -> Tensor:
        """The hidden tensor before the activation."""
        return Affine(self.scale, self.shift)(linear(x, self.weight, self.map))

    def change(self, x: Tensor, delta: Tensor) -> Tensor:
        """The first-order change of that with a change of the rows."""
        weight, shift = self.unpacked(delta)
        return Affine(self.scale, shift)(linear(x, weight, self.map))

    def unpacked(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and shift in a (kept, columns [+ 1]) matrix."""
        if not self.free:
            return delta.reshape(self.weight.shape), None
        return delta[:, :-1].reshape(self.weight.shape), delta[:, -1]

    def moved(self, delta: Tensor) -> Producer:
        """This producer with a change added."""
        weight, shift = self.unpacked(delta)
        if shift is None or self.shift is None or self.held is None:
            return replace(self, weight=self.weight + weight)
        return replace(self, weight=self.weight + weight, shift=self.shift + shift, held=self.held + shift)


@dataclass(frozen=True)
class SiteLayers:
    """The layers of a site, of the channels that stay.

    Attributes:
        producers: by name: "producer", and "gate" in a gated site; "path" for a linear path beside the channels.
        activation: what follows them; of a gated site, on the gate.
        behind: what follows that, in order, up to the consumers.
        consumer: the geometry of the consumers, which is the same for all.
    """

    producers: Mapping[str, Producer]
    activation: Pointwise
    behind: tuple[Affine | Depthwise | Pointwise, ...]
    consumer: LinearMap

    @classmethod
    def of(cls, model: nn.Module, site: Site, kept: Tensor, down: Tensor | None = None) -> SiteLayers | None:
        """The layers as they are in a model that still has all channels; None where they are not of this kind.

        Args:
            model: with the site as it was found.
            site: of this model.
            kept: (k,) int64, channels.
            down: (rank, d_in), a linear path beside them.
        """
        if not _may_be_refitted(model, site) or site.producer is None:
            return None
        bridge = site.bridge
        producers = {"producer": _producer(model, site.producer, bridge.up_rows(kept), bridge.norm_before, kept)}
        if site.gate is not None:
            producers["gate"] = _producer(model, site.gate, kept, "", kept)
        elif bridge.packed:
            producers["gate"] = _producer(model, site.producer, bridge.gate_rows(kept), "", kept)
        if down is not None:
            weight = down.to(producers["producer"].weight)
            if site.producer.kind == "conv2d":
                weight = weight[:, :, None, None]
            producers["path"] = Producer(site.producer, weight)
        stages = _layer_stages(model, site, kept)
        activation = next(stages)
        assert isinstance(activation, Pointwise)
        return cls(producers, activation, tuple(stages), site.consumers[0])

    @property
    def width(self) -> int:
        """Channels that the consumers read: those that stay, and those of the linear path."""
        return sum(len(producer.weight) for name, producer in self.producers.items() if name != "gate")

    def moved(self, deltas: Deltas) -> SiteLayers:
        """These layers with changed producers."""
        return replace(self, producers={name: p.moved(deltas[name]) for name, p in self.producers.items()})

    def hidden(self, x: Tensor) -> Tensor:
        """What the consumers read."""
        activated = self.producers.get("gate", self.producers["producer"])
        z = self.activation(activated(x))
        if "gate" in self.producers:
            z = z * self.producers["producer"](x)
        for stage in self.behind:
            z = stage(z)
        return self._with_path(z, x)

    def linearised(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """What the consumers read; the slope at each producer's hidden tensor; the slopes of the later activations."""
        if "gate" in self.producers:
            up = self.producers["producer"](x)
            f, slope = self.activation.sloped(self.producers["gate"](x))
            z, slopes = f * up, {"producer": f, "gate": slope * up}
        else:
            z, slope = self.activation.sloped(self.producers["producer"](x))
            slopes = {"producer": slope}
        later: list[Tensor] = []
        for stage in self.behind:
            if isinstance(stage, Pointwise):
                z, slope = stage.sloped(z)
                later.append(slope)
            else:
                z = stage(z)
        if "path" in self.producers:
            slopes["path"] = torch.ones_like(self.producers["path"](x))
        return self._with_path(z, x), slopes, later

    def change(self, x: Tensor, slopes: Mapping[str, Tensor], later: Iterable[Tensor], deltas: Deltas) -> Tensor:
        """The first-order change of what the consumers read, by the chain rule."""
        z = slopes["producer"] * self.producers["producer"].change(x, deltas["producer"])
        if "gate" in self.producers:
            z = z + slopes["gate"] * self.producers["gate"].change(x, deltas["gate"])
        following = iter(later)
        for stage in self.behind:
            z = next(following) * z if isinstance(stage, Pointwise) else stage.change(z)
        if "path" in self.producers:
            z = torch.cat([z, self.producers["path"].change(x, deltas["path"])], 1)
        return z

    def _with_path(self, z: Tensor, x: Tensor) -> Tensor:
        if "path" not in self.producers:
            return z
        return torch.cat([z, self.producers["path"](x)], 1)


def linear(x: Tensor, weight: Tensor, m: LinearMap) -> Tensor:
    """A linear map of this geometry, without a bias; its channels are in dimension 1."""
    if m.kind == "conv2d":
        return F.conv2d(x, weight, None, m.stride, m.padding, m.dilation)
    return F.linear(x, weight)


def vector(values: Tensor, like: Tensor) -> Tensor:
    """One value for each channel, in the dimensions of a tensor whose channels are in dimension 1."""
    return values.reshape(-1, *[1] * (like.dim() - 2))


def _may_be_refitted(model: nn.Module, site: Site) -> bool:
    """Whether the site is of the kind that is run here: dense maps of one kind, with nothing but pixels in between."""
    producer, bridge = site.producer, site.bridge
    if producer is None or not bridge.pixelwise or (bridge.gated and bridge.norm_before):
        return False
    if producer.groups > 1 or any(consumer.groups > 1 for consumer in site.consumers):
        return False
    if len({m.kind == "conv2d" for m in site.maps}) > 1 or len({c.kernel for c in site.consumers}) > 1:
        return False
    return all(unusual_padding(model.get_submodule(m.name)) is None for m in site.maps)


def _layer_stages(model: nn.Module, site: Site, kept: Tensor) -> Iterator[Affine | Depthwise | Pointwise]:
    """What a hidden channel passes, from the activation on; a norm before it belongs to the producer."""
    reached = False
    for stage in site.bridge.stages:
        reached = reached or stage.kind == "activation"
        if not reached:
            continue
        if stage.kind == "norm":
            yield _norm(model, stage.name, kept)
        elif stage.map is not None:
            module = model.get_submodule(stage.map.name)
            bias = bias_of(module)
            if bias is not None:
                bias = bias[kept].float()
            yield Depthwise(stage.map, weight_of(module)[kept].float(), bias)
        elif stage.place is not None:
            yield Pointwise(_function(model, stage.place, kept, site.width))


def _producer(model: nn.Module, m: LinearMap, rows: Tensor, norm: str, kept: Tensor) -> Producer:
    module = model.get_submodule(m.name)
    folded, holder, places = Affine(None, None), module, rows
    if norm:
        folded, holder, places = _norm(model, norm, kept), model.get_submodule(norm), kept
    shift, bias = folded.shift, bias_of(module)
    if bias is not None:  # the norm acts on the bias as on all that the map gives
        shift = folded(bias[rows].float())
    held = cast("Tensor | None", getattr(holder, "bias", None))
    if held is not None:
        held = held.detach()[places].float()
    return Producer(m, weight_of(module)[rows].float(), folded.scale, shift, held)


def _norm(model: nn.Module, name: str, kept: Tensor) -> Affine:
    """A BatchNorm at the kept channels."""
    norm = model.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = None if norm.weight is None else norm.weight.detach()
    bias = None if norm.bias is None else norm.bias.detach()
    scale, shift = norm_as_affine(norm.running_mean, norm.running_var, weight, bias, norm.eps)
    return Affine(scale[kept].float(), shift[kept].float())


def _function(model: nn.Module, place: Place, kept: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """The activation for the kept channels alone; one with a parameter a channel sees all channels, others zero."""
    with attachment.exposed(model, [place]) as modules:
        f = copy.deepcopy(modules[place]).float().eval()
    f.requires_grad_(False)
    if all(parameter.numel() <= 1 for parameter in f.parameters()):
        return lambda h: f(h.clone())  # it may work in place

    def on_kept(h: Tensor) -> Tensor:
        full = h.new_zeros(h.shape[0], n, *h.shape[2:]).index_copy(1, kept, h)
        seen: Tensor = f(full)
        return seen.index_select(1, kept)

    return on_kept
