"""What a site looks like after surgery: which layers remain, and how large they are.

Surgery builds what this file describes, and costs are counted from it, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from shallower.core.text import amount
from shallower.errors import PlanError
from shallower.planning.geometry import (
    composed,
    fitted_map,
    geometry,
    is_plain,
    kernel_of,
    not_foldable,
    padded,
    resized,
    same_stride,
)
from shallower.sites import LinearMap, Site

if TYPE_CHECKING:
    from shallower.planning.entries import Entry


FormKind = Literal["merged", "pair", "apart", "narrower", "partial", "removed"]
"""merged    one linear map in each consumer's place; producer and activation are identities
pair      two linear maps with nothing between them, all constants in the consumers' biases
apart     the two layers as they were, with nothing between them and the constants in the producer's bias
narrower  the same layers with fewer channels
partial   kept channels beside a linear path, through a `PartialActivation`
removed   an activation place: the activation is an identity
"""

Becomes = Literal["", "merged", "apart", "pair"]
"""What a site without kept channels is to become: one of these forms, or "" for the cheapest that is exact."""

Through = Literal["channels", "inputs", "outputs"]
"""What each channel of a linear path is: one of the site's or of the fit's, one of the producer's inputs, or one of the
consumers' outputs. All three are exact; the least is taken."""


@dataclass(frozen=True)
class Form:
    """A site after surgery.

    Attributes:
        kind: see `FormKind`.
        producer, gate: what they become; None where they become identities or were none.
        consumers: what they become.
        before: parameters and MACs of the site as this entry found it.
        kept: channels that keep their activation.
        rank: channels of the linear path.
        through: what these are.
        constant: whether one more channel carries the constants of the dropped ones, in front of zero padding.
        inside: whether the constants of the linear path stay in the producer's bias, in front of the consumers; else
            they go into the consumers' biases.
        between: what the depthwise convolutions between become.
        projections: what the maps of an attention site become.
        slopes: parameters of the kept channels' slope activation.
        activation: parameters of the activation itself.
        norms: parameters of the BatchNorms that remain.
        why: why the layers do not merge into one; in "merged", why they should not have.
    """

    kind: FormKind
    producer: LinearMap | None
    gate: LinearMap | None
    consumers: tuple[LinearMap, ...]
    before: tuple[int, int]
    kept: int = 0
    rank: int = 0
    through: Through = "channels"
    constant: bool = False
    inside: bool = False
    between: tuple[LinearMap, ...] = ()
    projections: tuple[LinearMap, ...] = ()
    slopes: int = 0
    activation: int = 0
    norms: int = 0
    why: str = ""

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """The linear maps that remain."""
        made = tuple(m for m in (self.gate, self.producer) if m is not None)
        return made + self.projections + self.between + self.consumers

    @property
    def width(self) -> int:
        """Channels between producer and consumers."""
        return self.kept + self.rank + self.constant

    @property
    def params_before(self) -> int:
        """Parameters of the site as this entry found it."""
        return self.before[0]

    @property
    def macs_before(self) -> int:
        """MACs of the site as this entry found it."""
        return self.before[1]

    @property
    def params(self) -> int:
        """Weights, biases, BatchNorm scales and shifts, slopes and the activation's own parameters."""
        return sum(m.params for m in self.maps) + self.norms + self.slopes + self.activation

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations on the example inputs that the sites were found with."""
        return sum(m.macs for m in self.maps)

    @property
    def cheaper(self) -> bool:
        """Whether the site has fewer parameters or fewer MACs than before, or an operation less at the same cost."""
        gone = self.kind == "removed" or (
            self.kind == "apart" and self.params <= self.params_before and self.macs <= self.macs_before
        )
        return gone or self.params < self.params_before or self.macs < self.macs_before


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
    prefer = _chained(ordered)
    done = _walk(ordered, prefer)
    # Which of two exact forms is smaller may depend on what a neighbour becomes.
    produced = {m.name for entry in ordered for m in (entry.site.producer, entry.site.gate) if m is not None}
    for i, entry in enumerate(ordered):
        free = len(entry.kept) == 0 and not entry.becomes and not entry.fold_skip
        if free and entry.site.name not in prefer and any(c.name in produced for c in entry.site.consumers):
            other: Becomes = "apart" if done[i].form.kind == "merged" else "merged"
            try:
                changed = _walk(ordered, {**prefer, entry.site.name: other})
            except PlanError:
                continue
            if _is_less(_total(changed), _total(done)):
                done, prefer = changed, {**prefer, entry.site.name: other}
    return done


def _chained(ordered: Sequence[Entry]) -> dict[str, Becomes]:
    """The sites that have to merge for a skip to fold into the last map of their chain."""
    before = {c.name: entry for entry in ordered for c in entry.site.consumers}
    wanted: dict[str, Becomes] = {}
    for entry in ordered:
        residual, producer = entry.site.residual, entry.site.producer
        while entry.fold_skip and residual and producer and producer.name != residual.source:
            earlier = before.get(producer.name)
            if earlier is None:
                break
            wanted[earlier.site.name] = "merged"
            producer = earlier.site.producer
    return wanted


def _total(done: Iterable[Step]) -> tuple[int, int]:
    """Parameters and MACs that all steps together add."""
    forms = [step.form for step in done]
    return sum(f.params - f.params_before for f in forms), sum(f.macs - f.macs_before for f in forms)


def _is_less(cost: tuple[int, int], other: tuple[int, int]) -> bool:
    return cost[0] <= other[0] and cost[1] <= other[1] and cost != other


def _walk(ordered: Iterable[Entry], prefer: Mapping[str, Becomes]) -> list[Step]:
    maps: dict[str, LinearMap] = {}
    reads: dict[str, str] = {}
    ordered = list(ordered)
    for entry in ordered:
        for m in entry.site.maps:
            maps.setdefault(m.name, m)
    done = []
    for entry in ordered:
        site = entry.site
        first = None if site.producer is None else reads.get(site.producer.name, site.producer.name)
        form = form_of(entry, maps, prefer.get(site.name, ""), first)
        if site.producer is not None and form.producer is not None:
            maps[site.producer.name] = form.producer
        if site.gate is not None and form.gate is not None:
            maps[site.gate.name] = form.gate
        maps.update({m.name: m for m in form.projections + form.between + form.consumers})
        if form.kind == "merged" and first is not None:
            reads.update({m.name: first for m in form.consumers})
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


def form_of(
    entry: Entry, maps: Mapping[str, LinearMap] | None = None, prefer: Becomes = "", first: str | None = None
) -> Form:
    """The smallest form that is exactly what the entry asks for.

    Args:
        entry: the fates.
        maps: the site's linear maps as they are now, by name; as they were found where None.
        prefer: a form where several are possible; the cheapest where "".
        first: the map whose input the producer reads, after merges the first of a chain; the producer where None.

    Raises:
        PlanError: a fitted linear path does not fit the producer's input, or the entry asks for a form that its site
            cannot take.
    """
    site = entry.site
    now = {m.name: m for m in site.maps} if maps is None else maps
    maps_before = [now[m.name] for m in site.maps]
    own = site.norm_params * site.width + (0 if _stays(site) else site.activation_params)
    own += sum(b.activation_params for b in site.between)
    before = (sum(m.params for m in maps_before) + own, sum(m.macs for m in maps_before))
    if site.kind == "heads":
        return _of_heads(entry, before, now)
    if site.producer is None:
        return Form("removed", None, None, (), before)
    producer = now[site.producer.name]
    gate = None if site.gate is None else now[site.gate.name]
    consumers = tuple(now[m.name] for m in site.consumers)
    if len(entry.kept) == 0:
        return _without_kept(entry, producer, consumers, before, prefer, first)
    between = tuple(now[b.map.name] for b in site.between)
    kept = len(entry.kept)
    rank, through = _path(entry, producer, consumers)
    width = kept + rank
    grouped = producer.groups > 1 or any(c.groups > 1 for c in consumers)
    if width != site.width and (grouped or site.not_narrow):
        why = site.not_narrow or "a map of it is a grouped convolution"
        raise PlanError(f"{site.name}: its channels cannot be kept one by one: {why}")
    fit = entry.fit
    refitted = (False, False)
    if fit is not None:
        _check_rows(entry, producer, gate)
        refitted = (fit.producer_bias is not None and not site.norm_before, fit.gate_bias is not None)
    inside = rank > 0 and padded(site, consumers) and has_constants(entry, producer)
    return Form(
        "partial" if rank else "narrower",
        resized(producer, d_out=2 * width if site.packed else width, bias=producer.bias or inside or refitted[0]),
        None if gate is None else resized(gate, d_out=kept, bias=gate.bias or refitted[1]),
        tuple(
            resized(c, d_in=width * site.block, bias=_biased(entry, producer, c, i, inside))
            for i, c in enumerate(consumers)
        ),
        before,
        kept=kept,
        rank=rank,
        through=through,
        inside=inside,
        between=tuple(replace(m, d_in=kept, d_out=kept, groups=kept) for m in between),
        slopes=0 if entry.alphas is None else (1 if entry.alphas.numel() == 1 else kept),
        activation=_activation_after(entry, kept, rank),
        norms=site.norm_params * width,
    )


def _of_heads(entry: Entry, before: tuple[int, int], now: Mapping[str, LinearMap]) -> Form:
    from shallower.sites.heads import narrowed

    kept = len(entry.kept)
    bias = True if entry.fit is not None and bool(entry.fit.biases[0].ne(0).any()) else None
    site = narrowed(entry.site, kept, bias)
    projections = () if site.heads is None else site.heads.maps
    # an earlier entry may have narrowed what the projections read
    projections = tuple(replace(m, d_in=now[m.name].d_in) for m in projections)
    return Form("narrower", None, None, site.consumers, before, kept=kept, projections=projections)


def _check_rows(entry: Entry, producer: LinearMap, gate: LinearMap | None) -> None:
    """Check that fitted rows read as many inputs as their layers have by now."""
    fitted = {} if entry.fit is None else entry.fit.singles
    if "producer" in fitted:
        _check_geometry(entry.site, producer)
    for role, m in (("producer", producer), ("gate", gate or producer)):
        if role in fitted and fitted[role].shape[1] != m.d_in:
            raise PlanError(
                f"{entry.site.name}: the rows of `{m.name}` were fitted for {fitted[role].shape[1]} inputs, and it has "
                f"{m.d_in} after the earlier entries of the plan. Apply those first, and fit this site on the result"
            )


def _without_kept(
    entry: Entry,
    producer: LinearMap,
    consumers: tuple[LinearMap, ...],
    before: tuple[int, int],
    prefer: Becomes,
    first: str | None,
) -> Form:
    """The form of a site of which no channel is kept: one map, or two with nothing between them."""
    site, fit = entry.site, entry.fit
    path, _ = _path(entry, producer, consumers)
    full = fit is not None and bool(fit.ups) and fit.down is None
    if full and entry.becomes not in ("", "merged"):
        raise PlanError(f"{site.name}: one fitted map for each consumer cannot become {entry.becomes!r}")
    if entry.becomes == "apart" and (site.gated or fit is not None):
        raise PlanError(f"{site.name}: a gated site and one with fitted maps become 'merged' or 'pair', not 'apart'")
    why = "" if full else next((why for c in consumers if (why := inexact(entry, producer, c))), "")
    two = None if full else _two(entry, producer, consumers, before, path)
    wanted = "merged" if two is None else entry.becomes or prefer
    if prefer == "merged" and why and not entry.becomes:
        raise PlanError(f"{site.name}: {why}")
    if not why or wanted == "merged":
        merged = _merged(entry, producer, consumers, before, first)
        if two is None or wanted == "merged" or (wanted == "" and _is_not_dearer(merged.maps, two.maps)):
            return replace(merged, why=why)
        why = why or (
            f"one layer would have {amount(merged.params)} parameters and {amount(merged.macs)} MACs, the two have "
            f"{amount(two.params)} and {amount(two.macs)}"
        )
    if entry.fold_skip:
        raise PlanError(f"{site.name}: its skip folds into one merged map only, and the layers do not merge: {why}")
    return replace(cast("Form", two), why=why)


def _merged(
    entry: Entry,
    producer: LinearMap,
    consumers: tuple[LinearMap, ...],
    before: tuple[int, int],
    first: str | None,
) -> Form:
    site, fit = entry.site, entry.fit
    merged = []
    for i, c in enumerate(consumers):
        bias = _biased(entry, producer, c, i)
        kernel = None if fit is None or not fit.ups or fit.down is not None else kernel_of(fit.ups[i])
        one = composed(producer, c, bias, flattened=site.flattened) if kernel is None else None
        m = one or fitted_map(producer, c, cast("tuple[int, int]", kernel), bias)
        if site.averaged:  # it reads the average, not the image
            m = replace(m, size=c.size)
        merged.append(m if fit is None else replace(m, groups=1))
    if not entry.fold_skip:
        return Form("merged", None, None, tuple(merged), before)
    residual, m = site.residual, merged[0]
    problem = "" if residual is None else not_foldable(m)
    if residual is None:
        problem = "no sum closes right around it"
    elif len(merged) > 1:
        problem = "it has several consumers"
    elif first not in (None, residual.source):
        problem = f"the skip starts at `{residual.source}`, and the plan does not merge all layers from there"
    if problem:
        raise PlanError(f"{site.name}: the skip does not fold into its kernel: {problem}")
    if residual is not None and residual.norm:
        before = (before[0] + 2 * m.d_out, before[1])
        m = replace(m, bias=True)
    return Form("merged", None, None, (m,), before)


def _two(
    entry: Entry, producer: LinearMap, consumers: tuple[LinearMap, ...], before: tuple[int, int], path: int
) -> Form:
    """Producer and consumers with nothing between them."""
    site, fit = entry.site, entry.fit
    constants = has_constants(entry, producer)
    behind = constants and padded(site, consumers)
    if fit is None and (producer.groups > 1 or any(c.groups > 1 for c in consumers)):
        # channels of grouped convolutions belong together: they stay, and those that are dropped become constants
        kept = resized(producer, bias=constants)
        return Form("apart", kept, None, consumers, before, rank=site.width, inside=True)
    if entry.becomes == "apart" or (fit is None and behind and not site.gated):
        dropped = entry.offsets[entry.dropped]
        constant = padded(site, consumers) and len(dropped) > 0 and (bool(dropped.ne(0).any()) or bool(site.norm_after))
        rank = path if path or constant else 1
        apart = [
            resized(
                c,
                d_in=(rank + constant) * site.block,
                bias=c.bias or (not constant and _biased(entry, producer, c, i, True)),
            )
            for i, c in enumerate(consumers)
        ]
        made = resized(producer, d_out=rank + constant, bias=constants)
        return Form("apart", made, None, tuple(apart), before, rank=rank, constant=constant, inside=True)
    rank = max(1, path)
    pair = [
        replace(resized(c, d_in=rank * site.block, bias=_biased(entry, producer, c, i, behind)), groups=1)
        for i, c in enumerate(consumers)
    ]
    made = replace(resized(producer, d_out=2 * rank if site.packed else rank, bias=behind), groups=1)
    return Form("pair", made, None, tuple(pair), before, rank=rank, inside=behind)


def _is_not_dearer(maps: Iterable[LinearMap], others: Iterable[LinearMap]) -> bool:
    """Whether maps have neither more weights nor more MACs than others; biases do not count."""

    def cost(m: LinearMap) -> tuple[int, int]:
        return replace(m, bias=False).params, m.macs

    own, other = [cost(m) for m in maps], [cost(m) for m in others]
    return all(sum(a[i] for a in own) <= sum(b[i] for b in other) for i in (0, 1))


def has_constants(entry: Entry, producer: LinearMap) -> bool:
    """Whether what goes from the producer to the consumers may hold a constant, where no channel keeps f."""
    if entry.fit is not None:
        return entry.fit.down_bias is not None
    site = entry.site
    return (
        producer.bias
        or bool(site.norm_before)
        or bool(site.norm_after)
        or bool(entry.offsets[entry.fates != 0].ne(0).any())
    )


def inexact(entry: Entry, producer: LinearMap, consumer: LinearMap) -> str:
    """Why one map would not be exactly what producer and consumer are together; "" where it would."""
    site = entry.site
    commutes = site.averaged and producer.taps == 1 and producer.groups == 1 and is_plain(producer)
    if commutes and entry.fit is None:  # the mean over pixels of a map of each pixel is the map of the mean
        return ""
    if site.not_merged:
        return site.not_merged
    if not padded(entry.site, [consumer]) or (entry.fit is not None and not entry.fit.ups):
        return ""
    pointwise = producer.taps == 1 and producer.padding == (0, 0)
    if pointwise and not has_constants(entry, producer):
        return ""
    return (
        f"`{consumer.name}` pads with zeros behind `{producer.name}`, so that one kernel would differ along the "
        "border. Move the padding to the first of the two, and fine-tune (move_padding)"
    )


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
        _check_geometry(site, producer)
        given = 0 if fit.down is None else fit.down.shape[0]
    if len(entry.kept) == 0:
        return given or producer.d_in, "channels"
    # A path through all inputs or all outputs is as exact and may be smaller; with kernels on both sides there is none.
    ranks: list[tuple[int, Through]] = [(given, "channels")] if given else []
    inside = padded(site, consumers) and has_constants(entry, producer)
    if site.averaged or site.pooled or site.flattened:  # the consumers do not read the producer's pixels one by one
        return given, "channels"
    if not inside and producer.taps == 1 and producer.groups == 1 and is_plain(producer):
        ranks.append((producer.d_in, "inputs"))
    if all(c.taps == 1 and c.groups == 1 and c.padding == (0, 0) for c in consumers) and same_stride(consumers):
        ranks.append((d_out, "outputs"))
    if not ranks:
        raise PlanError(f"{site.name}: kept channels and one full map do not fit beside each other; give down and ups")
    return min(ranks, key=lambda rank: rank[0])


def _check_geometry(site: Site, producer: LinearMap) -> None:
    """Check that a producer still is the kind of convolution that maps were fitted for."""
    if site.producer is not None and geometry(producer) != geometry(site.producer):
        raise PlanError(
            f"{site.name}: its maps were fitted for another kernel, stride or padding than `{producer.name}` has after "
            "the earlier entries of the plan. Apply those first, and fit this site on the result"
        )


def _stays(site: Site) -> bool:
    """Whether the activation's parameters stay in the model when it goes here, since others use it too."""
    return site.activation_shared or (site.activation is not None and bool(site.activation.calls))


def _activation_after(entry: Entry, kept: int, rank: int) -> int:
    """Parameters that a site's activations have when they act on `kept` channels."""
    site = entry.site

    def left(params: int) -> int:
        return kept if params == site.width > 1 else params

    behind = sum(left(b.activation_params) for b in site.between)
    if entry.alphas is not None and entry.family == "prelu":  # the slopes take the place of the activation
        return behind
    copied = left(site.activation_params) != site.activation_params
    if site.activation is not None and site.activation.calls:
        copied = copied or entry.alphas is not None or rank > 0
    return behind + (left(site.activation_params) if copied or not _stays(site) else 0)


def _biased(entry: Entry, producer: LinearMap, consumer: LinearMap, i: int, inside: bool = False) -> bool:
    """Whether the consumer needs a bias: it has one, or a constant goes into it.

    With `inside`, the constants of linear channels stay in the producer's bias.
    """
    if consumer.bias or consumer.kind == "conv1d":
        return True
    if entry.fit is not None:
        return bool(entry.fit.biases[i].ne(0).any()) or (entry.fit.down_bias is not None and not inside)
    site = entry.site
    linear, dropped = entry.linear, entry.dropped
    if bool(entry.offsets[dropped].ne(0).any()) or (len(dropped) > 0 and bool(site.norm_after) and not site.between):
        return True
    if inside or len(linear) == 0:
        return False
    shifted = bool(entry.offsets[linear].ne(0).any()) or bool(site.norm_after)
    return shifted or producer.bias or bool(site.norm_before)
