"""Which form a site takes: the smallest that is exactly what its entry asks for.

Surgery builds what this describes, and costs are counted from it, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shallower.errors import PlanError
from shallower.planning.entries import Becomes, Entry
from shallower.planning.forms.collapsed import collapsed
from shallower.planning.forms.constants import has_constants, needs_bias
from shallower.planning.forms.cuts import TensorCut, TensorsLeft
from shallower.planning.forms.form import Form
from shallower.planning.forms.linear_path import check_geometry, path_of
from shallower.planning.geometry import resized_map
from shallower.sites import LinearMap, Site, by_name, tally


def form_of(
    entry: Entry, maps: Mapping[str, LinearMap] | None = None, prefer: Becomes = "", first: str | None = None
) -> Form:
    """The smallest form that is exactly what the entry asks for.

        form = form_of(sh.Entry.collapse(site))
        form.kind, form.params, form.macs

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
    if site.followed:
        return form_of_followed(entry, TensorsLeft().cut(entry, {}, set()))
    if maps is None:
        maps = by_name(site.maps)
    if site.branch is not None:
        return Form("gone", None, None, (), (site.params, site.macs))
    before = _before(site, maps)
    if site.producer is None:
        return Form("removed", None, None, (), before)
    producer, consumers = maps[site.producer.name], tuple(maps[m.name] for m in site.consumers)
    if len(entry.kept) == 0:
        return collapsed(entry, producer, consumers, before, prefer, first)
    return _narrower(entry, producer, consumers, maps, before)


def form_of_followed(entry: Entry, cuts: tuple[TensorCut, ...]) -> Form:
    """The form of a followed site whose tensors become these."""
    site = entry.site
    params = sum(cut.elements[0] for cut in cuts if cut.trained)
    macs = sum(cut.macs[0] for cut in cuts)
    kept = len(entry.kept)
    return Form(
        "cut",
        None,
        None,
        (),
        (params, macs + site.products),
        kept=kept,
        products=site.products_each * kept,
        cuts=cuts,
    )


def _before(site: Site, now: Mapping[str, LinearMap]) -> tuple[int, int]:
    """Parameters and MACs of a site whose maps are these by now."""
    maps = tally(now[m.name] for m in site.maps)
    return maps.params + site.bridge.params, maps.macs + site.products


def _narrower(
    entry: Entry,
    producer: LinearMap,
    consumers: tuple[LinearMap, ...],
    now: Mapping[str, LinearMap],
    before: tuple[int, int],
) -> Form:
    """The same layers with k channels that keep f, and r that carry a linear path."""
    site, fit, kept = entry.site, entry.fit, len(entry.kept)
    gate = None if site.gate is None else now[site.gate.name]
    rank, through = path_of(entry, producer, consumers)
    width = kept + rank
    grouped = producer.groups > 1 or any(c.groups > 1 for c in consumers)
    if width != site.width and (grouped or site.bridge.not_narrow is not None):
        why = site.bridge.not_narrow or "a map of it is a grouped convolution"
        raise PlanError(f"{site.name}: its channels cannot be kept one by one: {why}")
    _check_rows(entry, producer, gate)
    inside = rank > 0 and site.bridge.pads(consumers) and has_constants(entry, producer)
    up_bias = fit is not None and fit.producer_bias is not None and not site.bridge.norm_before
    gate_bias = fit is not None and fit.gate_bias is not None
    made = resized_map(producer, d_out=width * (1 + site.bridge.packed), bias=producer.bias or inside or up_bias)
    read = (
        resized_map(c, d_in=width * site.bridge.block, bias=needs_bias(entry, producer, c, i, inside))
        for i, c in enumerate(consumers)
    )
    return Form(
        "partial" if rank else "narrower",
        made,
        None if gate is None else resized_map(gate, d_out=kept, bias=gate.bias or gate_bias),
        tuple(read),
        before,
        kept=kept,
        rank=rank,
        through=through,
        inside=inside,
        between=tuple(replace(now[m.name], d_in=kept, d_out=kept, groups=kept) for m in site.bridge.depthwise),
        slopes=_slopes(entry),
        activation=_activation_after(entry, kept),
        norms=site.bridge.norm_params * width,
    )


def _slopes(entry: Entry) -> int:
    """Parameters of the slope activation of the kept channels: one for all, or one each."""
    if entry.alphas is None:
        return 0
    return min(len(entry.alphas), len(entry.kept))


def _check_rows(entry: Entry, producer: LinearMap, gate: LinearMap | None) -> None:
    """Check that fitted rows read as many inputs as their layers have by now."""
    if entry.fit is None:
        return
    fitted = entry.fit.singles
    if "producer" in fitted:
        check_geometry(entry.site, producer)
    for role, m in (("producer", producer), ("gate", gate or producer)):
        if role in fitted and fitted[role].shape[1] != m.d_in:
            raise PlanError(
                f"{entry.site.name}: the rows of `{m.name}` were fitted for {fitted[role].shape[1]} inputs, and it has "
                f"{m.d_in} after the earlier entries of the plan. Apply those first, and fit this site on the result"
            )


def _activation_after(entry: Entry, kept: int) -> int:
    """Parameters that a site's activations have when they act on `kept` channels.

    One that others use too has parameters of its own here only where it is narrowed.
    """
    site, params = entry.site, 0
    replaced = _is_prelu(entry)
    for stage in site.bridge.stages:
        left = stage.params
        if left == site.width > 1:
            left = kept
        is_f = stage.place == site.activation
        if not (is_f and replaced) and not (stage.stays and left == stage.params):
            params += left
    return params


def replaces_activation(entry: Entry) -> bool:
    """Whether the site does without its f, and without the parameters that others of its calls may share."""
    site, kept = entry.site, len(entry.kept)
    narrowed = kept < site.width and site.activation_params == site.width > 1
    return kept == 0 or narrowed or _is_prelu(entry)


def _is_prelu(entry: Entry) -> bool:
    """Whether slopes take f's place, and not only stand around it."""
    return entry.alphas is not None and entry.family == "prelu"
