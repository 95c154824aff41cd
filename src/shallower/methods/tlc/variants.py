"""The forms that a group of overlapping sites may take, as plans for the group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from shallower.errors import PlanError
from shallower.planning.entries import Becomes, Entry, Fate
from shallower.planning.forms import steps
from shallower.planning.forms.constants import inexact
from shallower.sites import LinearMap, Site, by_name

_MOST_TOGETHER = 4
"""Overlapping sites for which all combinations of forms are tried."""


@dataclass(frozen=True)
class Variant:
    """One way to do a group of sites.

    Attributes:
        label: for people, unique in the group.
        entries: one for each site.
        fitted: whether it only comes close.
    """

    label: str
    entries: tuple[Entry, ...]
    fitted: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """MACs and parameters, as differences from the layers as they are."""
        macs = params = 0
        for step in steps(self.entries):
            # of overlapping sites the later ones count what the earlier ones left
            macs += step.form.macs - step.form.macs_before
            params += step.form.params - step.form.params_before
        return macs, params


def is_open(group: Sequence[Entry]) -> bool:
    """Whether there is a form to decide for every entry of a group."""
    return all(map(_is_open, group))


def _is_open(entry: Entry) -> bool:
    site = entry.site
    decided = len(entry.kept) > 0 or entry.fit is not None or entry.becomes != ""
    plain = site.kind not in ("heads", "activation") and site.producer is not None and site.calls == 1
    bridge = site.bridge
    return plain and not decided and not (bridge.gated or bridge.has("depthwise") or bridge.has("average"))


def all_channels(group: Sequence[Entry]) -> Variant:
    """Nothing but the activations gone: the layers apart, the channels that are dropped among them."""
    return Variant("apart, all channels", tuple(map(_unsliced, group)))


def _unsliced(entry: Entry) -> Entry:
    slopes = torch.where(entry.fates == Fate.DROP, 0.0, entry.slopes)
    return replace(entry, fates=torch.full_like(entry.fates, int(Fate.LINEAR)), slopes=slopes, becomes="apart")


def exact_variants(group: Sequence[Entry]) -> Iterator[Variant]:
    """All exact forms of a group but the one that keeps every channel."""
    sliced = any(len(entry.dropped) > 0 for entry in group)
    forms: tuple[Becomes, ...] = ("apart", "merged")
    choices = list(itertools.product(forms, repeat=len(group)))
    if len(group) > _MOST_TOGETHER:
        choices = [choices[0], choices[-1]]
    for choice in choices:
        if set(choice) == {"apart"} and not sliced:
            continue  # the same as with all channels
        label = _label(group, choice)
        entries = [replace(entry, becomes=becomes) for entry, becomes in zip(group, choice, strict=True)]
        if set(choice) == {"merged"} and group[-1].site.residual is not None:
            folded = (*entries[:-1], replace(entries[-1], fold_skip=True))
            if is_exact(folded):
                yield Variant(f"{label} with the skip inside", folded)
        if is_exact(entries):
            yield Variant(label, tuple(entries))


def _label(group: Sequence[Entry], choice: Sequence[Becomes]) -> str:
    if len(set(choice)) == 1:
        return choice[0]
    return ", ".join(f"{e.site.consumers[0].name} {becomes}" for e, becomes in zip(group, choice, strict=True))


def is_exact(entries: Sequence[Entry]) -> bool:
    """Whether the entries can be applied, with every merge that they ask for exact."""
    maps = {m.name: m for entry in entries for m in entry.site.maps}
    try:
        for step in steps(entries):
            site, form = step.entry.site, step.form
            producer = maps[cast("LinearMap", site.producer).name]
            if form.kind == "merged" and any(inexact(step.entry, producer, maps[c.name]) for c in site.consumers):
                return False
            maps |= by_name(form.maps)
    except PlanError:
        return False
    return True


def skips(site: Site, kernel: LinearMap) -> tuple[bool, ...]:
    """Whether the skip around a site may go into a fitted kernel: (True, False) where it may, (False,) else."""
    if site.residual is None or site.residual.source not in ("", cast("LinearMap", site.producer).name):
        return (False,)
    same = kernel.d_in == kernel.d_out and kernel.stride == (1, 1)
    centred = all(k % 2 and 2 * p == k - 1 for k, p in zip(kernel.kernel, kernel.padding, strict=True))
    return (True, False) if same and centred else (False,)
