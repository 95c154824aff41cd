"""The fates of one site's channels, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.planning.fits import Fit, checked
from shallower.sites import Site

Family = Literal["blend", "prelu"]
"""Slope activations that kept channels may have: a x + (1 - a) f(x), or max(x, 0) + a min(x, 0)."""

Becomes = Literal["", "merged", "apart", "pair"]
"""What a site without kept channels is to become: one of these forms, or "" for the cheapest that is exact."""

MOST_NOTE = 2000
"""Characters that an entry's note may have."""


class Fate(IntEnum):
    """What happens to one hidden channel.

        dropped = (entry.fates == sh.Fate.DROP).nonzero()

    Members are the integers of `Entry.fates`.
    """

    KEEP = 0
    """It stays, with its activation."""
    LINEAR = 1
    """f becomes an affine map: z = slope * h + offset (in a gated site z = slope * u + offset, u the up projection)."""
    DROP = 2
    """Its output becomes the constant `offset`."""


@dataclass(frozen=True, eq=False)
class Entry:
    """The fates of one site's channels.

    Attributes:
        site: as found in the model; channel indices are always the original ones.
        fates: (n,) int8 of `Fate`. An activation place has no channels (n = 0): its activation goes.
        slopes: (n,) float64; read where the fate is LINEAR.
        offsets: (n,) float64; added where LINEAR, the constant where DROP. Where depthwise convolutions stand between
            the activation and the consumers, the constant is what the consumers read.
        alphas: (1,) or (n,) float64, slope a of the slope activation that kept channels have; None: plain f.
        family: of that slope activation: "blend" a x + (1 - a) f(x), "prelu" max(x, 0) + a min(x, 0).
        fit: fitted maps, or None. With a fit neither slopes nor offsets are read.
        becomes: the form that a site without kept channels is to take (see `FormKind`): "merged" also where it is
            more expensive, "apart" or "pair" also where one map would be cheaper; "" for the cheapest that is exact.
        fold_skip: fold the skip around the site (`site.residual`) into its merged map, and take the sum away.
        note: why this was decided, for people.
        error: squared error of the fitted maps on held-out rows, as a part of the (weighted) variance there; None
            where nothing was fitted or held out.

    Raises:
        PlanError: shapes, types or numbers are not these, or the site does not allow what is asked for.
    """

    site: Site
    fates: Tensor
    slopes: Tensor
    offsets: Tensor
    alphas: Tensor | None = None
    family: Family = "blend"
    fit: Fit | None = None
    becomes: Becomes = ""
    fold_skip: bool = False
    note: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        n = self.site.width
        fates = _vector(self.site, "fates", self.fates, n)
        if fates.is_floating_point() or bool(((fates < 0) | (fates > 2)).any()):
            raise PlanError(f"{self.site.name}: fates are the integers 0 (keep), 1 (linear) and 2 (drop)")
        object.__setattr__(self, "fates", fates.to(torch.int8))
        for name in ("slopes", "offsets"):
            object.__setattr__(self, name, _numbers(self.site, name, getattr(self, name), n))
        if self.alphas is not None:
            single = isinstance(self.alphas, Tensor) and tuple(self.alphas.shape) == (1,)
            object.__setattr__(self, "alphas", _numbers(self.site, "alphas", self.alphas, 1 if single else n))
        if self.family not in ("blend", "prelu"):
            raise PlanError(f"{self.site.name}: the family of slopes is 'blend' or 'prelu', not {self.family!r}")
        if self.site.bridge.gated and self.family == "prelu" and self.alphas is not None:
            raise PlanError(f"{self.site.name}: a gated site has no PReLU slopes; use family='blend'")
        if self.becomes not in ("", "merged", "apart", "pair"):
            raise PlanError(f"{self.site.name}: a site becomes 'merged', 'apart' or 'pair', not {self.becomes!r:.40}")
        if not isinstance(self.note, str) or len(self.note) > MOST_NOTE:
            raise PlanError(f"{self.site.name}: the note is a text of at most {MOST_NOTE} letters")
        if not isinstance(self.fold_skip, bool):
            raise PlanError(f"{self.site.name}: fold_skip is true or false")
        if self.error is not None and not 0 <= self.error < math.inf:
            raise PlanError(f"{self.site.name}: the error is {self.error}, and must be a finite number of at least 0")
        if self.fit is not None:
            object.__setattr__(self, "fit", checked(self.site, self.fit, len(self.kept)))
        self._check_allowed()

    def _check_allowed(self) -> None:
        site, bridge, kept = self.site, self.site.bridge, len(self.kept)
        if site.branch is not None and (kept or self.fit is not None or self.alphas is not None or self.shifts_dropped):
            raise PlanError(f"{site.name}: an entry of a branch drops it; leave it out of the plan to keep it")
        linear = len(self.linear) > 0
        if self.fit is not None:  # its path says so then, and the fates do not
            linear = bool(self.fit.ups)
        if linear and bridge.not_linear is not None:
            raise PlanError(f"{site.name}: no channel may become linear: {bridge.not_linear}")
        if 0 < kept < site.width and bridge.not_narrow is not None:
            raise PlanError(f"{site.name}: its channels cannot be kept one by one: {bridge.not_narrow}")
        if (self.becomes or self.fold_skip) and (kept or site.producer is None):
            raise PlanError(f"{site.name}: only a site without kept channels takes another form, or folds a skip in")
        if self.fold_skip and site.residual is None:
            raise PlanError(f"{site.name}: there is no sum right around the site whose skip could be folded in")
        if site.followed or bridge.has("depthwise"):
            what = "with depthwise convolutions between"
            if site.followed:
                what = "that is cut wherever its channels stand"
            if kept == 0:
                raise PlanError(f"{site.name}: a site {what} keeps at least one channel")
            if kept < site.least:
                raise PlanError(f"{site.name}: {site.least} are chosen of what is kept; keep at least as many")
            if self.alphas is not None:
                raise PlanError(f"{site.name}: a site {what} takes no slopes")
        if site.followed and self.shifts_dropped:
            raise PlanError(
                f"{site.name}: its dropped channels become zeros; correct the consumer's bias instead (a fit)"
            )
        if self.fit is None and not bridge.norm_after and kept:
            self._check_border()

    def _check_border(self) -> None:
        """Refuse a constant in front of zero padding: along the border the consumer would read zeros instead."""
        padding = [c.name for c in self.site.consumers if self.site.bridge.pads([c])]
        if padding and self.shifts_dropped:
            raise PlanError(
                f"{self.site.name}: `{padding[0]}` pads with zeros, so that a constant in its input would be wrong "
                "along the border. Set the offsets to 0 and correct the consumer's bias instead (a fit with biases); "
                "move the padding first (move_padding); or make the channel linear with slope 0, which is exact"
            )

    @classmethod
    def collapse(
        cls,
        site: Site,
        slopes: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        becomes: Becomes = "",
        fold_skip: bool = False,
        note: str = "",
    ) -> Entry:
        """Every channel linear, with slope 1 and offset 0 unless others are given, each (n,)."""
        n = site.width
        fates = torch.full((n,), int(Fate.LINEAR), dtype=torch.int8)
        if slopes is None:
            slopes = torch.ones(n, dtype=torch.float64)
        if offsets is None:
            offsets = torch.zeros(n, dtype=torch.float64)
        return cls(site, fates, slopes, offsets, becomes=becomes, fold_skip=fold_skip, note=note)

    @classmethod
    def narrow(
        cls,
        site: Site,
        kept: Tensor | Sequence[int] | Sequence[bool],
        constants: Tensor | None = None,
        fit: Fit | None = None,
        *,
        note: str = "",
        error: float | None = None,
    ) -> Entry:
        """Some channels stay, the others are dropped and become `constants`, or 0.

            sh.Entry.narrow(site, range(256))
            sh.Entry.narrow(site, scores > 0.5)

        Args:
            site: whose channels.
            kept: the channels that stay: their indices, each once (a tensor, an array, a list or a range), or a mask
                (n,) of booleans.
            constants: (n,), read where a channel is dropped.
            fit: fitted maps, or None.
            note: why, for people.
            error: of the fit on held-out rows.

        Raises:
            PlanError: `kept` is neither, or the site does not allow this.
        """
        if not isinstance(site, Site):
            raise PlanError(f"an entry is of a site, not of a {type(site).__name__}; sites are found by find_sites")
        if site.kind == "activation":
            raise PlanError(
                f"{site.name}: an activation without a width of its own is not narrowed; it goes by collapse"
            )
        n = site.width
        fates = torch.full((n,), int(Fate.DROP), dtype=torch.int8)
        fates[_indices(site, kept)] = int(Fate.KEEP)
        if constants is None:
            constants = torch.zeros(n, dtype=torch.float64)
        slopes = torch.ones(n, dtype=torch.float64)
        return cls(site, fates, slopes, constants, fit=fit, note=note, error=error)

    @classmethod
    def drop(cls, site: Site, *, note: str = "") -> Entry:
        """A branch or a layer goes.

            sh.Plan((sh.Entry.drop(sites["model.layers.3:layer"]),))

        Raises:
            PlanError: the site is none.
        """
        if not isinstance(site, Site) or site.branch is None:
            name = site.name if isinstance(site, Site) else type(site).__name__
            raise PlanError(f"{name}: only a branch or a layer is dropped as a whole; find_sites(..., kinds='branch')")
        return cls.narrow(site, (), note=note)

    @cached_property
    def kept(self) -> Tensor:
        """Indices of the channels that stay, ascending, int64."""
        return self._where(Fate.KEEP)

    @cached_property
    def linear(self) -> Tensor:
        """Indices of the channels that become linear, ascending, int64."""
        return self._where(Fate.LINEAR)

    @cached_property
    def dropped(self) -> Tensor:
        """Indices of the channels that become constants, ascending, int64."""
        return self._where(Fate.DROP)

    @cached_property
    def shifts_linear(self) -> bool:
        """Whether a linear channel has an offset other than 0."""
        return bool(self.offsets[self.linear].ne(0).any())

    @cached_property
    def shifts_dropped(self) -> bool:
        """Whether a dropped channel becomes a constant other than 0."""
        return bool(self.offsets[self.dropped].ne(0).any())

    def _where(self, fate: Fate) -> Tensor:
        return (self.fates == fate).nonzero().flatten()


def _indices(site: Site, kept: Any) -> Tensor:
    """The channels that are kept, from indices or a mask of booleans."""
    what = f"{site.name}: the kept channels"
    try:
        given = kept.detach().cpu() if isinstance(kept, Tensor) else torch.as_tensor(list(kept))
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"{what} are indices or a mask of booleans, not {type(kept).__name__}: {error}") from None
    if given.dim() != 1:
        raise PlanError(f"{what} are one row of numbers, not a tensor of shape {tuple(given.shape)}")
    if given.dtype == torch.bool:
        if len(given) != site.width:
            raise PlanError(f"{what}: the mask has shape ({len(given)},), and must have shape ({site.width},)")
        return given.nonzero().flatten()
    if given.numel() == 0:
        return given.long()
    if given.is_floating_point() or given.is_complex():
        raise PlanError(f"{what} are integers or booleans, not {str(given.dtype).removeprefix('torch.')}")
    outside = given[(given < 0) | (given >= site.width)]
    if len(outside):
        raise PlanError(f"{what}: there is no channel {int(outside[0])}; the site has {site.width}, counted from 0")
    if int(given.bincount().max()) > 1:
        raise PlanError(f"{what}: an index comes twice. If this is a mask, make it boolean (mask.bool())")
    return given.long()


def _vector(site: Site, name: str, value: Tensor, n: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise PlanError(f"{site.name}: {name} is a tensor, not a {type(value).__name__}")
    if tuple(value.shape) != (n,):
        raise PlanError(f"{site.name}: {name} has shape {tuple(value.shape)}, and must have shape ({n},)")
    if value.is_meta:
        raise PlanError(f"{site.name}: {name} is a meta tensor; a plan holds numbers")
    return value.detach().cpu()


def _numbers(site: Site, name: str, value: Tensor, n: int) -> Tensor:
    vector = _vector(site, name, value, n).to(torch.float64)
    if not bool(vector.isfinite().all()):
        raise PlanError(f"{site.name}: {name} has a number that is not finite")
    return vector
