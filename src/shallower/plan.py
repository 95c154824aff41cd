"""What is to happen to each hidden channel, as plain data.

A method decides and returns a `Plan`; surgery applies it. A plan is self-contained: it names modules, holds
fates and, where they were computed, fitted maps. Saved as plan.json and plan.safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from torch import Tensor

from shallower.sites import Site

Family = Literal["blend", "prelu"]


class Fate(IntEnum):
    """What happens to one hidden channel."""

    KEEP = 0
    """It stays, with its activation."""
    LINEAR = 1
    """f becomes an affine map: z = slope * h + offset (in a gated site z = slope * u + offset, u the up projection)."""
    DROP = 2
    """Its output becomes the constant `offset`."""


@dataclass(frozen=True)
class Fit:
    """Maps fitted on data, which replace the consumers' own weights and the LINEAR channels' slopes.

        y = consumers[i] f(h_kept) + ups[i] (down x) + biases[i]

    Attributes:
        consumers: for each consumer (d_out, kept) - for a convolution (d_out, kept, kh, kw) - in the logical
            orientation (Conv1D's transposition is the surgery's business).
        biases: for each consumer (d_out,).
        down: (rank, d_in), first half of the linear path that all consumers share; None where there is no path,
            or where the path is one full map.
        ups: for each consumer (d_out, rank), or (d_out, d_in) where `down` is None; empty where there is no path.
    """

    consumers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    down: Tensor | None = None
    ups: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Entry:
    """The fates of one site's channels.

    Attributes:
        site: as found in the model; channel indices are always the original ones.
        fates: (n,) int8 of `Fate`.
        slopes: (n,) float64; read where the fate is LINEAR.
        offsets: (n,) float64; added where LINEAR, the constant where DROP.
        alphas: (1,) or (n,) float64, slope a of the slope activation that kept channels have; None: plain f.
        family: of that slope activation: "blend" a x + (1 - a) f(x), "prelu" max(x, 0) + a min(x, 0).
        fit: fitted maps, or None.
    """

    site: Site
    fates: Tensor
    slopes: Tensor
    offsets: Tensor
    alphas: Tensor | None = None
    family: Family = "blend"
    fit: Fit | None = None


@dataclass(frozen=True)
class Plan:
    """An ordered list of entries, each relative to the model after the earlier ones.

    Attributes:
        entries: at most one per site.
        fingerprint: of the weights the plan was made for; "" where it depends on no weights (a plain collapse).
        method: which method made it, for people.
    """

    entries: tuple[Entry, ...]
    fingerprint: str = ""
    method: str = ""
