"""What a site looks like after surgery: which layers remain, and how large they are.

Surgery builds what this file describes, and costs are counted from it, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from shallower.errors import PlanError
from shallower.sites import LinearMap

if TYPE_CHECKING:
    from shallower.plan import Entry

FormKind = Literal["merged", "pair", "narrower", "partial", "removed"]
"""merged    one linear map in each consumer's place; producer and activation are identities
pair      two linear maps with nothing between them
narrower  the same layers with fewer channels
partial   kept channels beside a linear path, through a `PartialActivation`
removed   an activation place: the activation is an identity
"""


Through = Literal["channels", "inputs", "outputs"]
"""What each channel of a linear path is: one of the site's or of the fit's, one of the producer's inputs, or one of the
consumers' outputs. All three are exact; the least is taken."""


@dataclass(frozen=True)
class Form:
    """A site after surgery.

    Attributes:
        kind: see `FormKind`.
        kept: channels that keep their activation.
        rank: channels of the linear path.
        through: what these are.
        producer, gate: what they become; None where they become identities or were none.
        consumers: what they become.
        slopes: parameters of the kept channels' slope activation.
        activation: parameters of the activation itself.
        norms: BatchNorms that remain, each with a scale and a shift for every channel.
        params_before, macs_before: of the site's maps as this entry found them.
    """

    kind: FormKind
    kept: int
    rank: int
    through: Through
    producer: LinearMap | None
    gate: LinearMap | None
    consumers: tuple[LinearMap, ...]
    slopes: int
    activation: int
    norms: int
    params_before: int
    macs_before: int

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """The linear maps that remain."""
        return tuple(m for m in (self.gate, self.producer) if m is not None) + self.consumers

    @property
    def params(self) -> int:
        """Weights, biases, BatchNorm scales and shifts, slopes and the activation's own parameters."""
        norms = 2 * self.norms * (self.kept + self.rank)
        return sum(m.params for m in self.maps) + norms + self.slopes + self.activation

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations on the example inputs that the sites were found with."""
        return sum(m.macs for m in self.maps)

    @property
    def cheaper(self) -> bool:
        """Whether the site has fewer parameters or fewer MACs than before."""
        return self.kind == "removed" or self.params < self.params_before or self.macs < self.macs_before


@dataclass(frozen=True)
class Step:
    """An entry of a plan and the form its site takes in the model that the earlier steps left."""

    entry: Entry
    form: Form


def steps(entries: Iterable[Entry]) -> list[Step]:
    """The entries in the order in which the network runs them, each with the form that its site takes.

    Where sites overlap - the consumer of one is the producer of the next - a later site starts from what the earlier
    one left: after a full collapse, from the merged map at the consumer's name.

    Raises:
        PlanError: two entries change the same layer in the same role, or a linear path does not fit what it reads.
    """
    ordered = in_execution_order(entries)
    done = _walk(ordered, {})
    # Which of two exact forms is smaller may depend on what a neighbour becomes.
    produced = {m.name for entry in ordered for m in (entry.site.producer, entry.site.gate) if m is not None}
    prefer: dict[str, FormKind] = {}
    for i, entry in enumerate(ordered):
        if len(entry.kept) == 0 and any(c.name in produced for c in entry.site.consumers):
            other: FormKind = "merged" if done[i].form.kind == "pair" else "pair"
            try:
                changed = _walk(ordered, {**prefer, entry.site.name: other})
            except PlanError:
                continue
            if _total(changed) < _total(done):
                done, prefer = changed, {**prefer, entry.site.name: other}
    return done


def _total(done: Iterable[Step]) -> int:
    return sum(step.form.params - step.form.params_before for step in done)


def _walk(ordered: Iterable[Entry], prefer: Mapping[str, FormKind]) -> list[Step]:
    maps: dict[str, LinearMap] = {}
    ordered = list(ordered)
    for entry in ordered:
        for m in entry.site.maps:
            maps.setdefault(m.name, m)
    done = []
    for entry in ordered:
        form = form_of(entry, maps, prefer.get(entry.site.name))
        site = entry.site
        if site.producer is not None and form.producer is not None:
            maps[site.producer.name] = form.producer
        if site.gate is not None and form.gate is not None:
            maps[site.gate.name] = form.gate
        maps.update({m.name: m for m in form.consumers})
        done.append(Step(entry, form))
    return done


def in_execution_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, sites whose producer is another's consumer after that one; otherwise in the order given.

    Raises:
        PlanError: a layer is producer, or consumer, at two sites, or the sites run in a circle.
    """
    waiting = list(entries)
    produced: dict[str, str] = {}
    consumed: dict[str, str] = {}
    for entry in waiting:
        site = entry.site
        roles = [(produced, m) for m in (site.producer, site.gate) if m is not None]
        roles += [(consumed, m) for m in site.consumers]
        for taken, m in roles:
            if m.name in taken:
                raise PlanError(
                    f"{site.name}: the layer `{m.name}` is already changed by the entry of `{taken[m.name]}`; "
                    "a plan has at most one entry for a site"
                )
            taken[m.name] = site.name
    ordered: list[Entry] = []
    while waiting:
        ahead = {m.name for entry in waiting for m in entry.site.consumers}
        ready = [e for e in waiting if not ahead & {m.name for m in (e.site.producer, e.site.gate) if m is not None}]
        if not ready:
            raise PlanError(f"the sites of this plan run in a circle: {', '.join(e.site.name for e in waiting)}")
        ordered.append(ready[0])
        waiting = [entry for entry in waiting if entry is not ready[0]]
    return ordered


def form_of(entry: Entry, maps: Mapping[str, LinearMap] | None = None, prefer: FormKind | None = None) -> Form:
    """The smallest form that is exactly what the entry asks for.

    Args:
        entry: the fates.
        maps: the site's linear maps as they are now, by name; as they were found where None.
        prefer: "merged" or "pair" where both are possible; the smaller one where None.

    Raises:
        PlanError: a fitted linear path does not fit the producer's input.
    """
    site = entry.site
    now = {m.name: m for m in site.maps} if maps is None else maps
    norms = bool(site.norm_before) + bool(site.norm_after)
    before = [now[m.name] for m in site.maps]
    params_before = sum(m.params for m in before) + 2 * norms * site.width + site.activation_params
    macs_before = sum(m.macs for m in before)
    if site.producer is None:
        return Form("removed", 0, 0, "channels", None, None, (), 0, 0, 0, params_before, macs_before)
    producer = now[site.producer.name]
    gate = None if site.gate is None else now[site.gate.name]
    consumers = tuple(now[m.name] for m in site.consumers)
    kept = len(entry.kept)
    path, through = _path(entry, producer, consumers)

    if kept == 0:
        merged = tuple(composed(producer, c, _biased(entry, producer, c, i)) for i, c in enumerate(consumers))
        rank = max(1, path)
        halves = 2 if site.packed else 1
        weights = rank * (halves * producer.d_in * producer.taps + sum(c.d_out * c.taps for c in consumers))
        convolved = producer.groups > 1 or any(c.groups > 1 for c in consumers)
        smaller = weights < sum(m.d_in * m.d_out * m.taps for m in merged)
        fitted_full = entry.fit is not None and bool(entry.fit.ups) and entry.fit.down is None
        if convolved or fitted_full or not (smaller if prefer is None else prefer == "pair"):
            return Form("merged", 0, 0, "channels", None, None, merged, 0, 0, 0, params_before, macs_before)
        return Form(
            "pair",
            0,
            rank,
            "channels",
            _resized(producer, d_out=halves * rank, bias=False),
            None,
            tuple(_resized(c, d_in=rank, bias=_biased(entry, producer, c, i)) for i, c in enumerate(consumers)),
            0,
            0,
            0,
            params_before,
            macs_before,
        )

    width = kept + path
    if width != site.width and (producer.groups > 1 or any(c.groups > 1 for c in consumers)):
        raise PlanError(f"{site.name}: the channels of a grouped convolution cannot be kept one by one")
    return Form(
        "partial" if path else "narrower",
        kept,
        path,
        through,
        _resized(producer, d_out=2 * width if site.packed else width),
        None if gate is None else _resized(gate, d_out=kept),
        tuple(_resized(c, d_in=width, bias=_biased(entry, producer, c, i)) for i, c in enumerate(consumers)),
        0 if entry.alphas is None else (1 if entry.alphas.numel() == 1 else kept),
        kept if site.activation_params == site.width else site.activation_params,
        norms,
        params_before,
        macs_before,
    )


def composed(producer: LinearMap, consumer: LinearMap, bias: bool) -> LinearMap:
    """The one map that is `consumer` after `producer`, at the consumer's name.

    Two convolutions give a kernel of d1 (k1 - 1) + s1 d2 (k2 - 1) + 1 with stride s1 s2 and padding p1 + s1 p2; where
    one of them has a single tap, the other's dilation stays instead.

    Raises:
        PlanError: one is a convolution and the other is not.
    """
    merged = _resized(consumer, d_in=producer.d_in, bias=bias)
    if (producer.kind == "conv2d") != (consumer.kind == "conv2d"):
        raise PlanError(f"{consumer.name}: a convolution and a linear layer do not merge into one")
    if producer.kind != "conv2d":
        return merged
    axes = [_axis(producer, consumer, i) for i in (0, 1)]
    return replace(
        merged,
        kernel=(axes[0][0], axes[1][0]),
        dilation=(axes[0][1], axes[1][1]),
        stride=(producer.stride[0] * consumer.stride[0], producer.stride[1] * consumer.stride[1]),
        padding=(
            producer.padding[0] + producer.stride[0] * consumer.padding[0],
            producer.padding[1] + producer.stride[1] * consumer.padding[1],
        ),
        groups=1,
    )


def _axis(producer: LinearMap, consumer: LinearMap, i: int) -> tuple[int, int]:
    """Kernel size and dilation along one axis of two convolutions in a row."""
    k1, d1, k2 = producer.kernel[i], producer.dilation[i], consumer.kernel[i]
    d2 = producer.stride[i] * consumer.dilation[i]
    if k1 == 1:
        return k2, d2 if k2 > 1 else 1
    if k2 == 1:
        return k1, d1
    return d1 * (k1 - 1) + d2 * (k2 - 1) + 1, 1


def _path(entry: Entry, producer: LinearMap, consumers: tuple[LinearMap, ...]) -> tuple[int, Through]:
    """Channels of the linear path, and what they are."""
    fit, site = entry.fit, entry.site
    d_out = sum(c.d_out for c in consumers)
    if fit is None:
        given = len(entry.linear)
        if given == 0:
            return 0, "channels"
    elif not fit.ups:
        return 0, "channels"
    else:
        d_in = producer.d_in if fit.down is None else fit.down.shape[1]
        if any(up.shape[1] != d_in for up in fit.ups if fit.down is None) or d_in != producer.d_in:
            found = fit.ups[0].shape[1] if fit.down is None else d_in
            raise PlanError(
                f"{site.name}: its linear path was fitted for {found} inputs, and `{producer.name}` has "
                f"{producer.d_in} after the earlier entries of the plan. Apply those first, and fit this site on the "
                "result"
            )
        given = 0 if fit.down is None else fit.down.shape[0]
    if len(entry.kept) == 0:
        return given or producer.d_in, "channels"
    # A path through all inputs or all outputs is as exact and may be smaller; with kernels on both sides there is none.
    ranks: list[tuple[int, Through]] = [(given, "channels")] if given else []
    if producer.taps == 1 and producer.groups == 1 and producer.stride == (1, 1) and producer.padding == (0, 0):
        ranks.append((producer.d_in, "inputs"))
    if all(c.taps == 1 and c.groups == 1 and c.padding == (0, 0) for c in consumers) and _same_stride(consumers):
        ranks.append((d_out, "outputs"))
    if not ranks:
        raise PlanError(f"{site.name}: kept channels and one full map do not fit beside each other; give down and ups")
    return min(ranks, key=lambda rank: rank[0])


def _same_stride(consumers: tuple[LinearMap, ...]) -> bool:
    return len({c.stride for c in consumers}) == 1


def _biased(entry: Entry, producer: LinearMap, consumer: LinearMap, i: int) -> bool:
    """Whether the consumer needs a bias: it has one, or a constant goes into it."""
    if consumer.bias or consumer.kind == "conv1d":
        return True
    if entry.fit is not None:
        return bool(entry.fit.biases[i].ne(0).any())
    site = entry.site
    gone = entry.fates != 0
    if not bool(gone.any()):
        return False
    shifted = bool(entry.offsets[gone].ne(0).any()) or bool(site.norm_after)
    return shifted or (len(entry.linear) > 0 and (producer.bias or bool(site.norm_before)))


def _resized(m: LinearMap, *, d_in: int | None = None, d_out: int | None = None, bias: bool | None = None) -> LinearMap:
    bias = m.bias if bias is None else bias
    return replace(
        m,
        d_in=m.d_in if d_in is None else d_in,
        d_out=m.d_out if d_out is None else d_out,
        bias=bias or m.kind == "conv1d",
    )
