"""The form of a site of which no channel is kept: one linear map, or two with nothing between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shallower.core.text import amount
from shallower.errors import PlanError
from shallower.planning.entries import Becomes, Entry
from shallower.planning.forms.constants import has_constants, inexact, needs_bias
from shallower.planning.forms.form import Form
from shallower.planning.forms.linear_path import path_of
from shallower.planning.geometry import composed, fitted_map, kernel_of, not_foldable, resized_map, ungrouped_map
from shallower.sites import LinearMap, tally

Consumers = tuple[LinearMap, ...]


def collapsed(
    entry: Entry,
    producer: LinearMap,
    consumers: Consumers,
    before: tuple[int, int],
    prefer: Becomes,
    first: str | None,
) -> Form:
    """One map where that is exact and not more expensive, else two.

    Args:
        entry: without kept channels.
        producer, consumers: as they are now.
        before: parameters and MACs of the site now.
        prefer: the form to take where both are possible; the cheapest where "".
        first: the map whose input the producer reads; the producer where None.

    Raises:
        PlanError: the site cannot take the form that the entry asks for.
    """
    site, fit = entry.site, entry.fit
    rank, _ = path_of(entry, producer, consumers)
    if fit is not None and fit.ups and fit.down is None:
        if entry.becomes not in ("", "merged"):
            raise PlanError(f"{site.name}: one fitted map for each consumer cannot become {entry.becomes!r}")
        return _merged(entry, producer, consumers, before, first)
    if entry.becomes == "apart" and (site.bridge.gated or fit is not None):
        raise PlanError(f"{site.name}: a gated site and one with fitted maps become 'merged' or 'pair', not 'apart'")
    why = next(filter(None, (inexact(entry, producer, c) for c in consumers)), "")
    if prefer == "merged" and why and not entry.becomes:
        raise PlanError(f"{site.name}: {why}")
    two = _two(entry, producer, consumers, before, rank)
    wanted = entry.becomes or prefer
    if not why or wanted == "merged":
        merged = _merged(entry, producer, consumers, before, first)
        if wanted == "merged" or (wanted == "" and _no_more_than(merged.maps, two.maps)):
            return replace(merged, why=why)
        why = why or (
            f"one layer would have {amount(merged.params)} parameters and {amount(merged.macs)} MACs, the two have "
            f"{amount(two.params)} and {amount(two.macs)}"
        )
    if entry.fold_skip:
        raise PlanError(f"{site.name}: its skip folds into one merged map only, and the layers do not merge: {why}")
    return replace(two, why=why)


def _merged(
    entry: Entry, producer: LinearMap, consumers: Consumers, before: tuple[int, int], first: str | None
) -> Form:
    """One map for each consumer, C diag(s) P or the fitted one, with the skip around it where that is to fold in."""
    maps = tuple(_one(entry, producer, c, i) for i, c in enumerate(consumers))
    if not entry.fold_skip:
        return Form("merged", None, None, maps, before)
    residual, m = entry.site.residual, maps[0]
    problem = not_foldable(m)
    if residual is None:
        problem = "no sum closes right around it"
    elif len(maps) > 1:
        problem = "it has several consumers"
    elif first not in (None, residual.source):
        problem = f"the skip starts at `{residual.source}`, and the plan does not merge all layers from there"
    if problem:
        raise PlanError(f"{entry.site.name}: the skip does not fold into its kernel: {problem}")
    if residual is not None and residual.norm:  # the BatchNorm in front of the sum folds into the map as well
        before = (before[0] + 2 * m.d_out, before[1])
        m = replace(m, bias=True)
    return Form("merged", None, None, (m,), before)


def _one(entry: Entry, producer: LinearMap, consumer: LinearMap, i: int) -> LinearMap:
    """The one map in the place of the producer and a consumer."""
    fit, bias = entry.fit, needs_bias(entry, producer, consumer, i)
    if fit is not None and fit.ups and fit.down is None:
        return ungrouped_map(fitted_map(producer, consumer, kernel_of(fit.ups[i]), bias))
    m = composed(producer, consumer, bias, flattened=entry.site.bridge.has("flatten"))
    if entry.site.bridge.has("average"):  # it reads the average, not the image
        m = replace(m, size=consumer.size)
    if fit is not None:
        return ungrouped_map(m)
    return m


def _two(entry: Entry, producer: LinearMap, consumers: Consumers, before: tuple[int, int], rank: int) -> Form:
    """Producer and consumers with nothing between them."""
    site, fit = entry.site, entry.fit
    constants = has_constants(entry, producer)
    border = constants and site.bridge.pads(consumers)
    if fit is None and (producer.groups > 1 or any(c.groups > 1 for c in consumers)):
        # channels of grouped convolutions belong together: they stay, and those that are dropped become constants
        made = resized_map(producer, bias=constants)
        return Form("apart", made, None, consumers, before, rank=site.width, inside=True)
    if entry.becomes == "apart" or (fit is None and border and not site.bridge.gated):
        return _apart(entry, producer, consumers, before, rank)
    rank = max(1, rank)
    read = []
    for i, c in enumerate(consumers):
        bias = needs_bias(entry, producer, c, i, border)
        read.append(ungrouped_map(resized_map(c, d_in=rank * site.bridge.block, bias=bias)))
    made = ungrouped_map(resized_map(producer, d_out=rank * (1 + site.bridge.packed), bias=border))
    return Form("pair", made, None, tuple(read), before, rank=rank, inside=border)


def _apart(entry: Entry, producer: LinearMap, consumers: Consumers, before: tuple[int, int], rank: int) -> Form:
    """The layers as they are, with the linear channels only.

    In front of zero padding one more channel carries the constants of the dropped ones, so that the consumer reads
    zeros along the border instead of them.
    """
    site = entry.site
    shifted = entry.shifts_dropped or (site.bridge.norm_after != "" and len(entry.dropped) > 0)
    constant = site.bridge.pads(consumers) and shifted
    if not rank and not constant:
        rank = 1
    read = []
    for i, c in enumerate(consumers):
        bias = c.bias or (not constant and needs_bias(entry, producer, c, i, True))
        read.append(resized_map(c, d_in=(rank + constant) * site.bridge.block, bias=bias))
    made = resized_map(producer, d_out=rank + constant, bias=has_constants(entry, producer))
    return Form("apart", made, None, tuple(read), before, rank=rank, constant=constant, inside=True)


def _no_more_than(maps: Iterable[LinearMap], others: Iterable[LinearMap]) -> bool:
    """Whether maps have neither more weights nor more MACs than others; biases do not count."""
    mine, theirs = tally(maps), tally(others)
    return mine.weights <= theirs.weights and mine.macs <= theirs.macs
