"""The fates of one site's channels, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.planning.forms import Becomes, Form, form_of
from shallower.planning.geometry import fitted_map, kernel_of, padded
from shallower.sites import Site

Family = Literal["blend", "prelu"]

MOST_NOTE = 2000


class Fate(IntEnum):
    """What happens to one hidden channel."""

    KEEP = 0
    """It stays, with its activation."""
    LINEAR = 1
    """f becomes an affine map: z = slope * h + offset (in a gated site z = slope * u + offset, u the up projection)."""
    DROP = 2
    """Its output becomes the constant `offset`."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Maps fitted on data, which replace the consumers' own weights and the LINEAR channels' slopes.

        y = consumers[i] z_kept + ups[i] (down x + down_bias) + biases[i]

    z_kept are the kept channels as the consumer reads them (behind a BatchNorm after f, where there is one), x is what
    the producer reads in the model after the earlier entries of the plan. All weights are in the logical orientation
    (Conv1D's transposition is the surgery's business).

    Attributes:
        consumers: for each consumer (d_out, kept) - for a convolution (d_out, kept, kh, kw), for attention heads
            (d_out, kept * block). May be empty where nothing is kept.
        biases: for each consumer (d_out,).
        down: (rank, d_in), first half of the linear path that all consumers share; None where there is no path,
            or where the path is one full map. For a convolution (rank, d_in, kh, kw), with the producer's geometry.
        ups: for each consumer (d_out, rank), or (d_out, d_in) where `down` is None; empty where there is no path. For a
            convolution (d_out, rank, kh, kw), with the consumer's geometry; where `down` is None, with any kernel, and
            the geometry that `forms.fitted_map` gives it.
        down_bias: (rank,), constants behind `down`, in front of a consumer's padding; None for none.
        producer: (kept, d_in), for a convolution (kept, d_in, kh, kw): new rows of the producer for the kept channels
            (in a packed gated site, of the up projection); None where they stay as they are.
        producer_bias: (kept,), with it: the new shift of the BatchNorm before f, or, where there is none, the
            producer's new bias; None where that stays as it is.
        gate: (kept, d_in), new rows of a gated site's gate; None where they stay as they are.
        gate_bias: (kept,), the new bias with it; None where it stays as it is.
    """

    consumers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    down: Tensor | None = None
    ups: tuple[Tensor, ...] = ()
    down_bias: Tensor | None = None
    producer: Tensor | None = None
    producer_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def singles(self) -> dict[str, Tensor]:
        """The tensors of which there is at most one, by name."""
        names = ("down", "down_bias", "producer", "producer_bias", "gate", "gate_bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: consumers.0, biases.0, down, ups.0."""
        named = {f"consumers.{i}": t for i, t in enumerate(self.consumers)}
        named |= {f"biases.{i}": t for i, t in enumerate(self.biases)}
        return named | self.singles | {f"ups.{i}": t for i, t in enumerate(self.ups)}


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
        becomes: the form that a site without kept channels is to take (see `forms.FormKind`): "merged" also where it is
            dearer, "apart" or "pair" also where one map would be cheaper; "" for the cheapest that is exact.
        fold_skip: fold the skip around the site (`site.residual`) into its merged map, and take the sum away.
        note: why this was decided, for people.

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
        if self.site.gated and self.family == "prelu" and self.alphas is not None:
            raise PlanError(f"{self.site.name}: a gated site has no PReLU slopes; use family='blend'")
        if self.becomes not in ("", "merged", "apart", "pair"):
            raise PlanError(f"{self.site.name}: a site becomes 'merged', 'apart' or 'pair', not {self.becomes!r:.40}")
        if not isinstance(self.note, str) or len(self.note) > MOST_NOTE:
            raise PlanError(f"{self.site.name}: the note is a text of at most {MOST_NOTE} letters")
        if not isinstance(self.fold_skip, bool):
            raise PlanError(f"{self.site.name}: fold_skip is true or false")
        if self.fit is not None:
            object.__setattr__(self, "fit", _checked_fit(self.site, self.fit, int((self.fates == Fate.KEEP).sum())))
        self._check_allowed()

    def _check_allowed(self) -> None:
        site, kept = self.site, len(self.kept)
        linear = len(self.linear) > 0 if self.fit is None else bool(self.fit.ups)
        if linear and site.kind == "heads":
            raise PlanError(f"{site.name}: an attention head is kept or dropped; it cannot become linear")
        if linear and site.not_linear:
            raise PlanError(f"{site.name}: no channel may become linear: {site.not_linear}")
        if 0 < kept < site.width and site.not_narrow:
            raise PlanError(f"{site.name}: its channels cannot be kept one by one: {site.not_narrow}")
        if (self.becomes or self.fold_skip) and (kept or site.producer is None):
            raise PlanError(
                f"{site.name}: only a site without kept channels becomes something else, or takes in a skip"
            )
        if self.fold_skip and site.residual is None:
            raise PlanError(f"{site.name}: there is no sum right around the site whose skip could be folded in")
        whole = "attention heads" if site.kind == "heads" else "depthwise convolutions between" if site.between else ""
        if whole and kept == 0:
            raise PlanError(f"{site.name}: a site of {whole} keeps at least one channel")
        if whole and self.alphas is not None:
            raise PlanError(f"{site.name}: a site of {whole} takes no slopes")
        if site.kind == "heads" and bool(self.offsets.ne(0).any()):
            raise PlanError(f"{site.name}: a dropped head gives zeros; correct the consumer's bias instead (a fit)")
        if self.fit is not None or site.norm_after or not kept:
            return
        if padded(site, site.consumers) and bool(self.offsets[self.fates == Fate.DROP].ne(0).any()):
            consumer = next(c for c in site.consumers if padded(site, [c]))
            raise PlanError(
                f"{site.name}: `{consumer.name}` pads with zeros, so that a constant in its input would be wrong along "
                "the border. Set the offsets to 0 and correct the consumer's bias instead (a fit with biases); move "
                "the padding first (move_padding); or make the channel linear with slope 0, which is exact"
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
        return cls(
            site,
            torch.full((n,), int(Fate.LINEAR), dtype=torch.int8),
            torch.ones(n, dtype=torch.float64) if slopes is None else slopes,
            torch.zeros(n, dtype=torch.float64) if offsets is None else offsets,
            becomes=becomes,
            fold_skip=fold_skip,
            note=note,
        )

    @classmethod
    def narrow(
        cls, site: Site, kept: Tensor, constants: Tensor | None = None, fit: Fit | None = None, *, note: str = ""
    ) -> Entry:
        """The channels `kept` (indices or a mask) stay, the others are dropped and become `constants` (n,), or 0."""
        n = site.width
        fates = torch.full((n,), int(Fate.DROP), dtype=torch.int8)
        fates[kept.cpu()] = int(Fate.KEEP)
        zeros, ones = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        return cls(site, fates, ones, zeros if constants is None else constants, fit=fit, note=note)

    @property
    def kept(self) -> Tensor:
        """Indices of the channels that stay, ascending, int64."""
        return self._where(Fate.KEEP)

    @property
    def linear(self) -> Tensor:
        """Indices of the channels that become linear, ascending, int64."""
        return self._where(Fate.LINEAR)

    @property
    def dropped(self) -> Tensor:
        """Indices of the channels that become constants, ascending, int64."""
        return self._where(Fate.DROP)

    def _where(self, fate: Fate) -> Tensor:
        return (self.fates == fate).nonzero().flatten()

    @property
    def form(self) -> Form:
        """What this entry alone makes of the site, with its costs."""
        return form_of(self)

    @property
    def params_after(self) -> int:
        """Parameters of the site with this entry alone applied; `site.params` is what it has now."""
        return self.form.params

    @property
    def macs_after(self) -> int:
        """MACs of the site with this entry alone applied; `site.macs` is what it has now."""
        return self.form.macs


def _vector(site: Site, name: str, value: Tensor, n: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise PlanError(f"{site.name}: {name} is a tensor, not a {type(value).__name__}")
    if tuple(value.shape) != (n,):
        raise PlanError(f"{site.name}: {name} has shape {tuple(value.shape)}, and the site has {n} channels")
    if value.is_meta:
        raise PlanError(f"{site.name}: {name} is a meta tensor; a plan holds numbers")
    return value.detach().cpu()


def _numbers(site: Site, name: str, value: Tensor, n: int) -> Tensor:
    vector = _vector(site, name, value, n).to(torch.float64)
    if not bool(vector.isfinite().all()):
        raise PlanError(f"{site.name}: {name} has a number that is not finite")
    return vector


def _checked_fit(site: Site, fit: Fit, kept: int) -> Fit:
    """The fit with 1x1 kernels written out, if everything in it has the shape that the site needs."""
    if site.kind == "activation":
        raise PlanError(f"{site.name}: an activation place has no maps to fit")
    consumers = tuple(fit.consumers)
    if not consumers and kept == 0:
        consumers = tuple(torch.zeros(c.d_out, 0, *_kernel(c.kind, c.kernel)) for c in site.consumers)
    for name, given in (("consumers", consumers), ("biases", fit.biases), ("ups", fit.ups or site.consumers)):
        if len(given) != len(site.consumers):
            raise PlanError(f"{site.name}: the fit has {len(given)} {name} for {len(site.consumers)} consumers")
    fitted = replace(fit, consumers=consumers, biases=tuple(fit.biases), ups=tuple(fit.ups))
    for name, tensor in fitted.tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PlanError(f"{site.name}: {name} of the fit is not a tensor of finite floating-point numbers")
    fitted = _with_producers(site, fitted, kept)
    block = site.block
    for i, c in enumerate(site.consumers):
        if kept and c.groups > 1:
            raise PlanError(f"{site.name}: `{c.name}` is a grouped convolution, whose kept columns cannot be fitted")
        wanted = (c.d_out, kept * block, *_kernel(c.kind, c.kernel))
        if tuple(consumers[i].shape) != wanted:
            raise PlanError(
                f"{site.name}: consumers.{i} of the fit has shape {tuple(consumers[i].shape)}; `{c.name}` with {kept} "
                f"kept channels needs {wanted}"
            )
        if tuple(fit.biases[i].shape) != (c.d_out,):
            raise PlanError(
                f"{site.name}: biases.{i} of the fit has shape {tuple(fit.biases[i].shape)}, not ({c.d_out},)"
            )
    return _with_path(site, fitted)


def _with_producers(site: Site, fit: Fit, kept: int) -> Fit:
    """The fit with its producer's and gate's rows checked."""
    changed: dict[str, Any] = {}
    gate = site.gate if site.gate is not None else site.producer if site.packed else None
    for name, m in (("producer", site.producer), ("gate", gate)):
        rows, bias = getattr(fit, name), getattr(fit, f"{name}_bias")
        if bias is not None and (rows is None or tuple(bias.shape) != (kept,)):
            raise PlanError(f"{site.name}: {name}_bias of the fit belongs to {name} and has shape ({kept},)")
        if rows is None:
            continue
        if m is None or kept == 0 or m.groups > 1:
            raise PlanError(f"{site.name}: the site has no {name} whose kept rows could be fitted")
        if site.packed and bias is not None and not m.bias:
            raise PlanError(f"{site.name}: `{m.name}` gives gate and up projection and has no bias to be fitted")
        rows = _with_kernel(rows, m.kind)
        if rows.shape[0] != kept or rows.dim() != 2 + 2 * (m.kind == "conv2d") or kernel_of(rows) != m.kernel:
            raise PlanError(
                f"{site.name}: {name} of the fit has shape {tuple(rows.shape)}; `{m.name}` with {kept} kept channels "
                f"needs {(kept, m.d_in, *_kernel(m.kind, m.kernel))}"
            )
        changed[name] = rows
    return replace(fit, **changed)


def _with_path(site: Site, fit: Fit) -> Fit:
    """The fit with its linear path checked."""
    down, producer = fit.down, site.producer
    if down is None and fit.down_bias is not None:
        raise PlanError(f"{site.name}: down_bias of the fit belongs to down, and there is none")
    if down is not None and not fit.ups:
        raise PlanError(f"{site.name}: the fit has the first half of a linear path but not the second (ups)")
    if not fit.ups:
        return fit
    if producer is None or site.averaged or site.pooled or site.flattened:
        what = "no producer" if producer is None else "an average, a pooling or a reshape in it"
        raise PlanError(f"{site.name}: the site has {what}, so that no fitted linear path could run beside it")
    if down is not None:
        down = _with_kernel(down, producer.kind)
        kernel = _kernel(producer.kind, producer.kernel)
        if down.dim() != 2 + len(kernel) or down.shape[0] < 1 or down.shape[2:] != kernel:
            raise PlanError(f"{site.name}: down of the fit has shape {tuple(down.shape)}, not (rank, d_in)")
        if fit.down_bias is not None and tuple(fit.down_bias.shape) != (down.shape[0],):
            raise PlanError(f"{site.name}: down_bias of the fit has not the shape ({down.shape[0]},)")
    ups = []
    for i, c in enumerate(site.consumers):
        up = _with_kernel(fit.ups[i], c.kind)
        rank = up.shape[1] if down is None else down.shape[0]
        kernel = _kernel(c.kind, c.kernel) if down is not None else tuple(up.shape[2:])
        if tuple(up.shape) != (c.d_out, rank, *kernel) or len(kernel) != len(_kernel(c.kind, c.kernel)):
            raise PlanError(
                f"{site.name}: ups.{i} of the fit has shape {tuple(fit.ups[i].shape)}, not {(c.d_out, rank, *kernel)}"
            )
        if down is None:
            fitted_map(producer, c, kernel_of(up))
        ups.append(up)
    return replace(fit, down=down, ups=tuple(ups))


def _kernel(kind: str, kernel: tuple[int, int]) -> tuple[int, ...]:
    """What a weight's shape has behind (d_out, d_in)."""
    return tuple(kernel) if kind == "conv2d" else ()


def _with_kernel(weight: Tensor, kind: str) -> Tensor:
    """A (d_out, d_in) matrix of a 1x1 convolution as its weight."""
    return weight[:, :, None, None] if kind == "conv2d" and weight.dim() == 2 else weight
