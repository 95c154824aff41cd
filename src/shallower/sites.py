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
class Site:
    """A place where an activation stands between linear maps, and what is around it.

    Attributes:
        name: unique in the model, readable: the common part of its modules' names, or the producer's.
        kind: see `Kind`.
        width: hidden channels n. For `kind="heads"`, heads or key-value groups; for `kind="activation"`, 0.
        producer: the map into the hidden tensor (the "up" projection of a gated site); None for `kind="activation"`.
        consumers: the maps that read the hidden tensor, in order of execution; nothing else reads it.
        activation: where f is; None for `kind="heads"`.
        activation_name: what f is, for people: "gelu", "relu", "silu".
        gate: the gate's producer in a gated site with separate maps.
        packed: in a gated site whose producer gives gate and up in one tensor, which half comes first.
        norm_before: BatchNorm between the producer and f; folded with the producer.
        norm_after: BatchNorm between f and the consumers; folded into them.
        dropouts: dropouts between producer and consumers; identity in eval mode, gone after a full collapse.
        calls: how often the site runs per forward pass (ALBERT: the number of layers).
        channels_first: the channel dimension of the hidden tensor is 1 (convolutions), not the last.
        not_linear: why no channel of this site may get the fate linear ("" where it may): for instance a zero-padded
            convolution as consumer. Keep and drop are always allowed.
        activation_params: parameters of the activation itself (PReLU: 1 or n); 0 for most.
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

    @property
    def gated(self) -> bool:
        """Whether z = f(gate x) * (producer x)."""
        return self.gate is not None or self.packed != ""

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """All linear maps of the site: gate, producer, consumers."""
        return tuple(m for m in (self.gate, self.producer) if m is not None) + self.consumers

    @property
    def params(self) -> int:
        """Weights, biases and BatchNorm scales and shifts of the site's maps, and the activation's parameters, now."""
        norms = 2 * self.width * (bool(self.norm_before) + bool(self.norm_after))
        return sum(m.params for m in self.maps) + norms + self.activation_params

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the site's maps on the example inputs, now."""
        return sum(m.macs for m in self.maps)

    @property
    def params_collapsed(self) -> int:
        """Parameters if the site became one linear map for each consumer; `params` where it cannot."""
        if self.not_linear or self.producer is None:
            return self.params
        return sum(self.producer.d_in * c.d_out * self.producer.taps * c.taps + c.d_out for c in self.consumers)

    @property
    def macs_collapsed(self) -> int:
        """MACs if the site became one linear map for each consumer; `macs` where it cannot."""
        if self.not_linear or self.producer is None:
            return self.macs
        return sum(c.positions * self.producer.d_in * c.d_out * self.producer.taps * c.taps for c in self.consumers)

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
            site = cls(**fields)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise SiteError(f"this is not the description of a site: {error}") from error
        if not isinstance(site.name, str) or not isinstance(site.width, int) or site.width < 0:
            raise SiteError("this is not the description of a site: name is text and width a number of channels")
        return site


def _linear_map(data: Mapping[str, Any] | None) -> LinearMap | None:
    return None if data is None else _required_map(data)


def _required_map(data: Mapping[str, Any]) -> LinearMap:
    pairs = {k: (int(v[0]), int(v[1])) for k, v in data.items() if k in ("kernel", "stride", "padding", "dilation")}
    return LinearMap(**{**data, **pairs})


def _place(data: Mapping[str, Any] | None) -> Place | None:
    return None if data is None else _required_place(data)


def _required_place(data: Mapping[str, Any]) -> Place:
    return Place(str(data["module"]), tuple((str(name), int(ordinal)) for name, ordinal in data["calls"]))


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
        raise SiteError(f"there is no site {key!r}; the sites are {_listing([site.name for site in self.items])}")

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


def amount(count: float) -> str:
    """A count for people, three significant digits: 33.6M, 1.2G, 940."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}" if count < 999.5 * limit else f"{count / limit:.0f}{unit}"
    return f"{count:.0f}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]


def _listing(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
