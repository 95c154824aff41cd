"""What can be squeezed in a model, as data.

A site is channels that can be kept, dropped or made linear together. Most stand between linear maps:

    x --producer--> h --activation--> z --consumer--> y

`find_sites` makes these objects from one recorded forward pass; methods read them, a plan carries them, and surgery
acts on the modules they name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Annotated, Any, Literal

from shallower.core.codec import Bounds, decode, encode
from shallower.errors import Refusal, SiteError
from shallower.sites.branch import Branch
from shallower.sites.bridge import Bridge, Gate, Stage
from shallower.sites.parts import Between, Count, LinearMap, Macs, Name, Place, Residual, tally
from shallower.sites.slots import Average, Choice, Follower, Listed, Slot, positions_each

Text = Annotated[str, Bounds(0, 2000)]

Kind = Literal[
    "feed-forward",
    "gated",
    "head",
    "position MLP",
    "convolution",
    "activation",
    "heads",
    "hidden",
    "stream",
    "experts",
    "branch",
]
"""What a site is in the network:

feed-forward  two linear maps inside a block that is repeated or has a residual around it
gated         z = f(gate x) * (producer x): SwiGLU, GeGLU
head          linear maps of a classifier or pooler
position MLP  maps positions, not features, and runs on few of them (Swin-V2's relative positions)
convolution   the producer or a consumer is a convolution that is not a 1x1 feed-forward block
activation    an activation without a hidden width of its own (after a residual sum, or with several readers)
heads         attention heads; one channel per head or per key-value group; for keep and drop only
hidden        channels between linear maps that were followed through whatever stands between; for keep and drop only
stream        the coupled channels of a stage: what its blocks read and add to
experts       the experts of a mixture; one channel per expert
branch        F of x + F(x), or a whole layer; it is one part
"""


@dataclass(frozen=True)
class Site:
    """Channels that can be kept, dropped or made linear together, and what is around them.

    Attributes:
        name: unique in the model, readable: the common part of its modules' names, or the producer's.
        kind: see `Kind`.
        width: hidden channels n. For `kind="heads"`, heads or key-value groups; for `kind="activation"`, 0.
        producer: the map into the hidden tensor (the "up" projection of a gated site); None for `kind="activation"` and
            where the channels were followed.
        consumers: the maps that read the hidden tensor, in order of execution; nothing else reads it. Where channels
            were followed, those that can be fitted: plain linear layers that read them and nothing else, or none.
        activation: where f is; None where the channels were followed.
        activation_name: what f is, for people: "gelu", "relu", "silu".
        gate: the gate's producer in a gated site with separate maps.
        packed: in a gated site whose producer gives gate and up in one tensor, which half comes first.
        norm_before: BatchNorm between the producer and f; folded with the producer. Of `kind="activation"`, the one
            whose output f reads, if any: none after a residual sum.
        norm_after: BatchNorm between f and the consumers; folded into them.
        dropouts: dropouts between producer and consumers; identity in eval mode, gone after a full collapse.
        calls: how often the site runs per forward pass (ALBERT: the number of layers).
        channels_first: the channel dimension of the hidden tensor is 1 (convolutions), not the last.
        not_linear: why no channel of this site may get the fate linear ("" where it may).
        activation_params: parameters of the activation itself (PReLU: 1 or n); 0 for most.
        activation_shared: that activation is used elsewhere too, so that its parameters stay when it goes here.
        activation_origin: the module that holds these parameters, by the first of its names; "" where it has none.
        activation_calls: how often that module runs per forward pass, here and elsewhere. Once sites with as many
            calls do without it, nothing uses it.
        norm_params: parameters for each hidden channel of all BatchNorms of the site together: 2 for one with scale and
            shift.
        not_merged: why producer and consumers must stay apart even where all channels are linear ("" where they need
            not): one of them pads, and not with zeros, or the average over all pixels stands between them.
        averaged: the consumers read the average over all pixels of the hidden tensor (an image), not every pixel.
        pooled: the pooling or resizing of the image between the activation and the consumers, by name ("max_pool2d"),
            "" where there is none. It does the same to every channel and leaves constants as they are.
        not_narrow: why channels cannot be kept and dropped one by one ("" where they may): a map is a grouped
            convolution, whose channels on both sides belong together.
        between: depthwise convolutions between the activation and the consumers, in order. Such a long site overlaps
            the two short ones that the convolution divides it into: it is for keep and drop, those are for linear.
        residual: the sum that closes right around the site, where there is one that can be taken away.
        slots: every axis of a parameter or buffer in which the channels stand, where they were followed.
        followers: whole numbers that fall with the channels.
        averages: calls that take averages over the channels, those of norms for instance.
        choices: calls that choose among the channels.
        lists: lists of modules whose entries the channels are.
        products_each: MACs of each channel in products of two computed tensors, on the example inputs.
        cached_each: numbers that the KV cache holds of each channel for one token, all calls together.
        branch: what goes with a branch or a layer; None for other sites.
    """

    name: Name
    kind: Kind
    width: Count
    producer: LinearMap | None
    consumers: tuple[LinearMap, ...]
    activation: Place | None
    activation_name: Name = ""
    gate: LinearMap | None = None
    packed: Literal["", "gate-first", "up-first"] = ""
    norm_before: Name = ""
    norm_after: Name = ""
    dropouts: tuple[Place, ...] = ()
    calls: Count = 1
    channels_first: bool = False
    not_linear: Text = ""
    activation_params: Count = 0
    activation_shared: bool = False
    activation_origin: Name = ""
    activation_calls: Count = 0
    norm_params: Count = 0
    not_merged: Text = ""
    averaged: bool = False
    pooled: Name = ""
    not_narrow: Text = ""
    between: tuple[Between, ...] = ()
    residual: Residual | None = None
    slots: Annotated[tuple[Slot, ...], Bounds(0, 20_000)] = ()
    followers: Annotated[tuple[Follower, ...], Bounds(0, 4_000)] = ()
    averages: Annotated[tuple[Average, ...], Bounds(0, 4_000)] = ()
    choices: Annotated[tuple[Choice, ...], Bounds(0, 4_000)] = ()
    lists: Annotated[tuple[Listed, ...], Bounds(0, 4_000)] = ()
    products_each: Macs = 0
    cached_each: Count = 0
    branch: Branch | None = None

    @cached_property
    def bridge(self) -> Bridge:
        """What stands between producer and consumers, as an object that is asked."""
        return Bridge(
            width=self.width,
            stages=tuple(_stages(self)),
            gate=_gate_of(self),
            block=self.block,
            dim=1 if self.channels_first else -1,
            norm_params=self.norm_params,
            not_linear=_not_linear(self),
            not_narrow=_not_narrow(self),
            not_merged=_not_merged(self),
            not_refitted=_not_narrow(self) or _not_refitted(self),
        )

    @property
    def gated(self) -> bool:
        """Whether z = f(gate x) * (producer x)."""
        return self.gate is not None or self.packed != ""

    @property
    def flattened(self) -> bool:
        """Whether the hidden tensor is an image that is flattened, with all its pixels, for linear consumers."""
        return self.channels_first and any(c.kind != "conv2d" and c.size != (0, 0) for c in self.consumers)

    @property
    def block(self) -> int:
        """Columns of a consumer that one channel has: those of a head, or the pixels of a flattened image."""
        if self.followed and self.consumers:
            return self.consumers[0].d_in // self.width
        if not self.flattened:
            return 1
        height, width = self.consumers[0].size
        return height * width

    @cached_property
    def maps(self) -> tuple[LinearMap, ...]:
        """All linear maps of the site: gate and producer, those between, consumers."""
        # in the order in which they run: those that make the hidden tensor first
        return (*filter(None, (self.gate, self.producer)), *(b.map for b in self.between), *self.consumers)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of all modules whose weights write, hold or read the channels, each once."""
        names = [slot.module for slot in self.slots] or [m.name for m in self.maps]
        if self.branch is not None:
            names = [gone.module for gone in self.branch.emptied]
        return tuple(dict.fromkeys(names))

    @property
    def columns_each(self) -> int:
        """Columns of a consumer's weight that one channel has: of all kernel positions, of all features of a head."""
        return self.consumers[0].taps * self.block

    @property
    def followed(self) -> bool:
        """Whether it is described by all the places of its channels, not by a producer and consumers."""
        return len(self.slots) > 0

    @cached_property
    def tensors(self) -> dict[str, Slot]:
        """The tensors in which a followed site stands, each with one of its slots."""
        return {slot.tensor: slot for slot in self.slots}

    @property
    def least(self) -> int:
        """How many channels must stay: a top-2 needs two experts."""
        found = 1
        for choice in self.choices:
            found = max(found, -(-choice.least // max(1, positions_each(choice.spans))))
        return found

    @property
    def params(self) -> int:
        """Weights, biases and BatchNorm scales and shifts of the site's maps, and the activation's own, now."""
        if self.branch is not None:
            return self.branch.params
        if self.followed:
            params = sum(prod(slot.shape) for slot in self.tensors.values() if slot.trained)
            for listed in self.lists:
                params += self.width * listed.params
            return params
        return tally(self.maps).params + self.bridge.params

    @property
    def norms(self) -> int:
        """BatchNorms between producer and consumers."""
        return len(self.bridge.norms)

    @property
    def products(self) -> int:
        """MACs of attention's products with the sequence; 0 for other sites."""
        return self.width * self.products_each

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the site on the example inputs, now."""
        if self.branch is not None:
            return self.branch.macs
        if self.followed:
            return sum(slot.macs(slot.shape) for slot in self.tensors.values()) + self.products
        return tally(self.maps).macs

    @property
    def params_collapsed(self) -> int:
        """Parameters if the site became one linear map for each consumer; `params` where it cannot."""
        if self.not_linear or self.not_merged or self.producer is None:
            return self.params
        # a merged map always has a bias: what f and the norms add goes into it
        return sum(self._merged_inputs * c.d_out * c.taps + c.d_out for c in self.consumers)

    @property
    def macs_collapsed(self) -> int:
        """MACs if the site became one linear map for each consumer; `macs` where it cannot."""
        if self.not_linear or self.not_merged or self.producer is None:
            return self.macs
        return sum(c.positions * self._merged_inputs * c.d_out * c.taps for c in self.consumers)

    @property
    def _merged_inputs(self) -> int:
        """Inputs that each output of one merged map has, taps of the consumer apart."""
        p = self.producer
        if p is None:
            return 0
        # every pixel of the flattened image is made of the whole image that the producer reads
        if self.flattened:
            return p.d_in * p.size[0] * p.size[1]
        return p.d_in * p.taps

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; `Site.from_json` reads it back."""
        data: dict[str, Any] = encode(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """The site that `to_json` described.

        Raises:
            SiteError: a key is unknown or missing, or a value is not what it may be.
        """
        return decode(cls, data, at="site", error=SiteError)


def _stages(site: Site) -> Iterable[Stage]:
    yield from _norm_stage(site.norm_before)
    f = site.activation
    if f is not None:
        # where a call of it is made a module, the module that is called remains
        stays = site.activation_shared or bool(f.calls)
        yield Stage("activation", f, params=site.activation_params, stays=stays)
    yield from _norm_stage(site.norm_after)
    for part in site.between:
        yield from _stages_around(part)
    if site.averaged:
        yield Stage("average")
    elif site.pooled:
        yield Stage("pool")
    if site.flattened:
        yield Stage("flatten")


def _stages_around(part: Between) -> Iterable[Stage]:
    yield Stage("depthwise", Place(part.map.name), part.map)
    yield from _norm_stage(part.norm_before)
    if part.activation is not None:
        yield Stage("activation", part.activation, params=part.activation_params)
    yield from _norm_stage(part.norm_after)


def _norm_stage(name: str) -> Iterable[Stage]:
    if name:
        yield Stage("norm", Place(name))


def _gate_of(site: Site) -> Gate:
    if site.packed:
        return site.packed
    if site.gate is not None:
        return "separate"
    return ""


def _not_merged(site: Site) -> Refusal | None:
    if site.not_merged:
        return Refusal(site.not_merged)
    return None


def _not_linear(site: Site) -> Refusal | None:
    if site.not_linear:
        return Refusal(site.not_linear)
    if site.kind == "heads":
        return Refusal("an attention head is kept or dropped; it cannot become linear")
    if site.followed:
        return Refusal("its channels are kept or dropped; what stands between them cannot become linear")
    if site.branch is not None:
        return Refusal("a branch is kept or dropped")
    if site.activation is None:
        return Refusal("it has no activation")
    return None


def _not_narrow(site: Site) -> Refusal | None:
    if site.followed or site.branch is not None:
        return None
    if site.not_narrow:
        return Refusal(site.not_narrow)
    if site.kind == "activation" or site.width == 0:
        return Refusal(
            "it has no hidden width: its channels are those of a residual sum or have other readers, and every layer "
            "that adds to it or reads it would have to be narrowed with it"
        )
    for m in (site.producer, site.gate, *site.consumers):
        if m is not None and m.groups > 1:
            return Refusal("the channels of a grouped convolution cannot be kept one by one")
    return None


def _not_refitted(site: Site) -> Refusal | None:
    written = any(follower.written is not None for follower in site.followers)
    if site.followed and written:
        return Refusal("a forward writes out a number for it; a plan by hand can narrow it (Entry.narrow)")
    if site.followed and site.consumers:
        if site.width > 1:
            return None
        return Refusal("it has one channel")
    if site.branch is not None:
        return Refusal("a branch is kept or dropped as a whole")
    if site.followed:
        return Refusal("no plain linear layer reads its channels alone; a plan by hand can narrow it (Entry.narrow)")
    if site.producer is None:
        return Refusal("it has no producer with a hidden width")
    if site.flattened:
        return Refusal("its consumers read its pixels one by one (narrow it by other means)")
    if len({(c.kind == "conv2d", c.kernel, c.stride, c.padding, c.dilation) for c in site.consumers}) > 1:
        return Refusal("its consumers read the hidden tensor in different ways")
    return None
