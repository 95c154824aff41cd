"""What can be squeezed in a model, as data.

A site is a place where an activation stands between linear maps:

    x --producer--> h --activation--> z --consumer--> y

`find_sites` (matching.py) makes these objects from one recorded forward pass; methods read them, a plan
carries them, and surgery acts on the modules they name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

from shallower.core.text import amount, listing
from shallower.errors import SiteError

Kind = Literal["feed-forward", "gated", "head", "position MLP", "convolution", "activation", "heads"]
"""What a site is in the network:

feed-forward  two linear maps inside a block that is repeated or has a residual around it
gated         z = f(gate x) * (producer x): SwiGLU, GeGLU
head          linear maps of a classifier or pooler
position MLP  maps positions, not features, and runs on few of them (Swin-V2's relative positions)
convolution   the producer or a consumer is a convolution that is not a 1x1 feed-forward block
activation    an activation without a hidden width of its own (after a residual sum, or with several readers)
heads         attention heads; one channel per head or per key-value group
"""


@dataclass(frozen=True)
class Place:
    """Where a pointwise operation stands in the model: something that can be exchanged for another module.

    Attributes:
        module: dotted name. With no `calls`, the module that is the operation. With `calls`, the module whose
            own `forward` makes these calls.
        calls: the calls, in order of execution: (name, ordinal). The name is the canonical function name ("relu",
            "gelu", "mul") or, for one of several calls of a child module, "self." and the child's name relative to
            `module`. The ordinal counts calls of that name that `module`'s own forward makes in one invocation,
            from 0.
    """

    module: str
    calls: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if not self.calls:
            return self.module
        name, ordinal = self.calls[0]
        return f"{self.module or 'model'}:{name}#{ordinal}"


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the model, by the dotted name of its module.

    Attributes:
        name: dotted name.
        kind: `nn.Linear`, Transformers' transposed `Conv1D`, or `nn.Conv2d`.
        d_in, d_out: features or channels.
        bias: whether it has one.
        positions: rows it is applied to in one forward pass on the example inputs, all calls together (tokens of
            the batch; for a convolution, output pixels of the batch).
        kernel, stride, padding, dilation, groups: of a convolution; neutral otherwise.
        size: height and width of the images that a convolution reads, or that were flattened into what a linear layer
            behind convolutions reads; (0, 0) for other linear layers, and where images of several sizes come.
    """

    name: str
    kind: Literal["linear", "conv1d", "conv2d"]
    d_in: int
    d_out: int
    bias: bool
    positions: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (0, 0)

    @property
    def taps(self) -> int:
        """Kernel positions: 1 for a linear layer, 9 for a 3x3 convolution."""
        return self.kernel[0] * self.kernel[1]

    @property
    def params(self) -> int:
        """Weights and bias."""
        return self.d_in // self.groups * self.d_out * self.taps + self.d_out * self.bias

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations on the example inputs, all calls together."""
        return self.positions * (self.d_in // self.groups) * self.d_out * self.taps


@dataclass(frozen=True)
class Residual:
    """The sum that closes right around a site: site(x) + x, with the very x that the site reads.

    Where all channels of the site are linear, the skip folds into the merged map, and the sum can go.

    Attributes:
        place: the call that adds. Made a module (`externalise`), it is called with the two summands in the order in
            which the forward has them.
        branch: which summand is the site's output, 0 or 1.
        norm: BatchNorm between the site's consumer and the sum, "" if there is none.
        source: the map that reads the x of the sum: the site's own producer; or, of the last site in a chain (the
            consumer of one is the producer of the next), the producer of the first, where the skip folds once the whole
            chain is linear.
    """

    place: Place
    branch: int
    norm: str = ""
    source: str = ""


@dataclass(frozen=True)
class Between:
    """A depthwise convolution on the way from a site's activation to its consumers.

    It maps every hidden channel to itself, so that channel j goes with it: its filter, its entry in the norms.

        ... activation - norm_after - [map - norm_before - activation - norm_after] - consumers

    Attributes:
        map: the convolution; groups, input and output channels are all the site's width.
        norm_before: BatchNorm between it and the activation behind it (or behind it, where there is no activation).
        activation: where the activation behind it is; None where there is none.
        activation_name: what that is, for people.
        norm_after: BatchNorm behind that activation.
        activation_params: parameters of the activation itself.
    """

    map: LinearMap
    norm_before: str = ""
    activation: Place | None = None
    activation_name: str = ""
    norm_after: str = ""
    activation_params: int = 0


Rows = tuple[int, int, int]
"""(start, step, length): channel g of a site has the rows start + g * step, ..., start + g * step + length - 1."""


@dataclass(frozen=True)
class Heads:
    """What a site of attention heads consists of beside its consumer, the output projection.

    A channel of the site is a key-value group: one key head, one value head and the query heads that share them.

    Attributes:
        module: dotted name of the module whose forward computes the attention.
        query, key, value: the projections; one and the same map where they are packed.
        head_dim: features of a query or key head.
        value_dim: features of a value head.
        queries_per_group: query heads for each key-value head.
        packed: "" with three maps; "blocks" where one map gives all queries, then all keys, then all values; "heads"
            where it gives query, key and value of each channel together.
        query_rows, key_rows, value_rows: which rows of their maps a channel has.
        counts: integer attributes of `module` that have to change with the number of channels, each with its value
            for one channel: (("num_heads", 1), ("split_size", 64)).
    """

    module: str
    query: LinearMap
    key: LinearMap
    value: LinearMap
    head_dim: int
    value_dim: int
    queries_per_group: int
    packed: Literal["", "blocks", "heads"]
    query_rows: Rows
    key_rows: Rows
    value_rows: Rows
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def block(self) -> int:
        """Columns of the output projection that one channel has."""
        return self.queries_per_group * self.value_dim

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """The projections, each once."""
        return tuple({m.name: m for m in (self.query, self.key, self.value)}.values())


@dataclass(frozen=True)
class Site:
    """A place where an activation stands between linear maps, and what is around it.

    Attributes:
        name: unique in the model, readable: the common part of its modules' names, or the producer's.
        kind: see `Kind`.
        width: hidden channels n. For `kind="heads"`, heads or key-value groups; for `kind="activation"`, 0.
        producer: the map into the hidden tensor (the "up" projection of a gated site); None for `kind="activation"` and
            `kind="heads"`.
        consumers: the maps that read the hidden tensor, in order of execution; nothing else reads it.
        activation: where f is; None for `kind="heads"`.
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
        heads: the projections, for `kind="heads"`.
    """

    name: str
    kind: Kind
    width: int
    producer: LinearMap | None
    consumers: tuple[LinearMap, ...]
    activation: Place | None
    activation_name: str = ""
    gate: LinearMap | None = None
    packed: Literal["", "gate-first", "up-first"] = ""
    norm_before: str = ""
    norm_after: str = ""
    dropouts: tuple[Place, ...] = ()
    calls: int = 1
    channels_first: bool = False
    not_linear: str = ""
    activation_params: int = 0
    activation_shared: bool = False
    norm_params: int = 0
    not_merged: str = ""
    averaged: bool = False
    pooled: str = ""
    not_narrow: str = ""
    between: tuple[Between, ...] = ()
    residual: Residual | None = None
    heads: Heads | None = None

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
        if self.heads is not None:
            return self.heads.block
        return self.consumers[0].size[0] * self.consumers[0].size[1] if self.flattened else 1

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """All linear maps of the site: gate and producer (or query, key and value), those between, consumers."""
        made = (self.gate, self.producer) if self.heads is None else self.heads.maps
        return (*(m for m in made if m is not None), *(b.map for b in self.between), *self.consumers)

    @property
    def params(self) -> int:
        """Weights, biases and BatchNorm scales and shifts of the site's maps, and the activation's own, now."""
        activation = 0 if self.activation_shared else self.activation_params
        own = self.width * self.norm_params + activation + sum(b.activation_params for b in self.between)
        return sum(m.params for m in self.maps) + own

    @property
    def norms(self) -> int:
        """BatchNorms between producer and consumers."""
        names = [self.norm_before, self.norm_after]
        return sum(map(bool, names + [name for b in self.between for name in (b.norm_before, b.norm_after)]))

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the site's maps on the example inputs, now."""
        return sum(m.macs for m in self.maps)

    @property
    def params_collapsed(self) -> int:
        """Parameters if the site became one linear map for each consumer; `params` where it cannot."""
        if self.not_linear or self.not_merged or self.producer is None:
            return self.params
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
        return p.d_in * (p.size[0] * p.size[1] if self.flattened else p.taps)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; `Site.from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """The site that `to_json` described.

        Raises:
            SiteError: a key is unknown or missing, or a value has the wrong type.
        """
        try:
            fields = dict(data)
            fields["producer"] = _linear_map(fields["producer"])
            fields["gate"] = _linear_map(fields.get("gate"))
            fields["consumers"] = tuple(_required_map(item) for item in fields["consumers"])
            fields["activation"] = _place(fields["activation"])
            fields["dropouts"] = tuple(_required_place(item) for item in fields.get("dropouts", ()))
            fields["between"] = tuple(_between(item) for item in fields.get("between", ()))
            fields["residual"] = _residual(fields.get("residual"))
            fields["heads"] = _heads(fields.get("heads"))
            site = cls(**fields)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise SiteError(f"this is not the description of a site: {error}") from error
        if not isinstance(site.name, str) or not isinstance(site.width, int) or site.width < 0:
            raise SiteError("this is not the description of a site: name is text and width a number of channels")
        return site


def _linear_map(data: Mapping[str, Any] | None) -> LinearMap | None:
    return None if data is None else _required_map(data)


_PAIRS = ("kernel", "stride", "padding", "dilation", "size")


def _required_map(data: Mapping[str, Any]) -> LinearMap:
    pairs = {k: (int(v[0]), int(v[1])) for k, v in data.items() if k in _PAIRS}
    return LinearMap(**{**data, **pairs})


def _place(data: Mapping[str, Any] | None) -> Place | None:
    return None if data is None else _required_place(data)


def _required_place(data: Mapping[str, Any]) -> Place:
    return Place(str(data["module"]), tuple((str(name), int(ordinal)) for name, ordinal in data["calls"]))


def _between(data: Mapping[str, Any]) -> Between:
    given = {**data, "map": _required_map(data["map"]), "activation": _place(data.get("activation"))}
    return Between(**given)


def _residual(data: Mapping[str, Any] | None) -> Residual | None:
    return None if data is None else Residual(**{**data, "place": _required_place(data["place"])})


def _heads(data: Mapping[str, Any] | None) -> Heads | None:
    if data is None:
        return None
    maps = {name: _required_map(data[name]) for name in ("query", "key", "value")}
    rows = {name: _rows(data[name]) for name in ("query_rows", "key_rows", "value_rows")}
    counts = tuple((str(name), int(each)) for name, each in data.get("counts", ()))
    return Heads(**{**data, **maps, **rows, "counts": counts})


def _rows(data: Any) -> Rows:
    start, step, length = (int(number) for number in data)
    return start, step, length


@dataclass(frozen=True)
class Sites:
    """The sites of a model, in order of execution, and what looked like one but is not usable.

        sites = sh.find_sites(model, example_inputs)
        print(sites)
        sites["encoder.layer.3"]
        sites.select("encoder.layer.*")
        sites.skipped["pooler"]             # the reason

    Attributes:
        items: the sites.
        skipped: name -> reason.
        params: parameters of the whole model.
        macs: MACs of the whole model on the example inputs.
    """

    items: tuple[Site, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    params: int = 0
    macs: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    @overload
    def __getitem__(self, key: str | int) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> Sites: ...
    def __getitem__(self, key: str | int | slice) -> Site | Sites:
        """The site of that name or position, or a slice of them.

        Raises:
            SiteError: there is no such site.
        """
        if isinstance(key, slice):
            return dataclasses.replace(self, items=self.items[key])
        if isinstance(key, int):
            try:
                return self.items[key]
            except IndexError:
                raise SiteError(f"there is no site number {key}; the model has {len(self.items)}") from None
        for site in self.items:
            if site.name == key:
                return site
        if key in self.skipped:
            raise SiteError(f"{key}: skipped when the sites were found: {self.skipped[key]}")
        raise SiteError(f"there is no site {key!r}; the sites are {listing([site.name for site in self.items])}")

    def __contains__(self, key: object) -> bool:
        return any(key is site or key == site.name for site in self.items)

    def select(self, which: str | Callable[[Site], bool]) -> Sites:
        """The subset whose names match a glob pattern, or for which a predicate holds, in the same order.

        sites.select("encoder.layer.*")
        sites.select(lambda site: site.kind == "gated")
        """
        if isinstance(which, str):
            return dataclasses.replace(self, items=tuple(s for s in self.items if fnmatchcase(s.name, which)))
        return dataclasses.replace(self, items=tuple(s for s in self.items if which(s)))

    def __str__(self) -> str:
        """A table: site, kind, activation, width, params and MACs now and if collapsed; then what was skipped."""
        header = ("site", "kind", "f", "width", "params", "collapsed", "MACs", "collapsed", "")
        rows: list[tuple[str, ...]] = [
            (
                site.name,
                site.kind,
                site.activation_name,
                str(site.width or ""),
                amount(site.params),
                amount(site.params_collapsed) if site.params_collapsed < site.params else "-",
                amount(site.macs),
                amount(site.macs_collapsed) if site.macs_collapsed < site.macs else "-",
                f"x{site.calls}" if site.calls > 1 else "",
            )
            for site in self.items
        ]
        lines = [f"{len(self.items)} sites; the model has {amount(self.params)} params and {amount(self.macs)} MACs"]
        if rows:
            lines += _table(header, rows, right=(3, 4, 5, 6, 7))
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
