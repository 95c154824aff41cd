"""What is to happen to each hidden channel, as plain data.

A method decides and returns a `Plan`; surgery applies it. A plan is self-contained: it names modules, holds
fates and, where they were computed, fitted maps. Saved as plan.json and plan.safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.forms import Form, composed, form_of, steps
from shallower.sites import Site, amount

Family = Literal["blend", "prelu"]


class CostWarning(UserWarning):
    """What was asked for is exact, but not cheaper than what was there."""


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

        y = consumers[i] z_kept + ups[i] (down x) + biases[i]

    z_kept are the kept channels as the consumer reads them (behind a BatchNorm after f, where there is one), x is what
    the producer reads in the model after the earlier entries of the plan.

    Attributes:
        consumers: for each consumer (d_out, kept) - for a convolution (d_out, kept, kh, kw) - in the logical
            orientation (Conv1D's transposition is the surgery's business). May be empty where nothing is kept.
        biases: for each consumer (d_out,).
        down: (rank, d_in), first half of the linear path that all consumers share; None where there is no path,
            or where the path is one full map. For a convolution (rank, d_in, kh, kw), with the producer's geometry.
        ups: for each consumer (d_out, rank), or (d_out, d_in) where `down` is None; empty where there is no path. For a
            convolution (d_out, rank, kh, kw), with the consumer's geometry; where `down` is None, with the geometry of
            the merged map.
    """

    consumers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    down: Tensor | None = None
    ups: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: consumers.0, biases.0, down, ups.0."""
        named = {f"consumers.{i}": t for i, t in enumerate(self.consumers)}
        named |= {f"biases.{i}": t for i, t in enumerate(self.biases)}
        named |= {} if self.down is None else {"down": self.down}
        return named | {f"ups.{i}": t for i, t in enumerate(self.ups)}


@dataclass(frozen=True, eq=False)
class Entry:
    """The fates of one site's channels.

    Attributes:
        site: as found in the model; channel indices are always the original ones.
        fates: (n,) int8 of `Fate`. An activation place has no channels (n = 0): its activation goes.
        slopes: (n,) float64; read where the fate is LINEAR.
        offsets: (n,) float64; added where LINEAR, the constant where DROP.
        alphas: (1,) or (n,) float64, slope a of the slope activation that kept channels have; None: plain f.
        family: of that slope activation: "blend" a x + (1 - a) f(x), "prelu" max(x, 0) + a min(x, 0).
        fit: fitted maps, or None. With a fit neither slopes nor offsets are read.

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

    def __post_init__(self) -> None:
        n = self.site.width
        if self.site.kind == "heads":
            raise PlanError(f"{self.site.name}: attention heads cannot be planned yet; exclude the site")
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
        if self.fit is not None:
            object.__setattr__(self, "fit", _checked_fit(self.site, self.fit, int((self.fates == Fate.KEEP).sum())))
        self._check_allowed()

    def _check_allowed(self) -> None:
        site = self.site
        linear = len(self.linear) > 0 if self.fit is None else bool(self.fit.ups)
        if linear and site.not_linear:
            raise PlanError(f"{site.name}: no channel may become linear: {site.not_linear}")
        if self.fit is not None or site.norm_after:
            return
        padded = next((c for c in site.consumers if c.padding != (0, 0)), None)
        if padded is not None and bool(self.offsets[self.fates != Fate.KEEP].ne(0).any()):
            raise PlanError(
                f"{site.name}: `{padded.name}` pads with zeros, so that a constant in its input would be wrong along "
                "the border. Set the offsets to 0 and correct the consumer's bias instead (a fit with biases)"
            )

    @classmethod
    def collapse(cls, site: Site, slopes: Tensor | None = None, offsets: Tensor | None = None) -> Entry:
        """Every channel linear, with slope 1 and offset 0 unless others are given, each (n,)."""
        n = site.width
        return cls(
            site,
            torch.full((n,), int(Fate.LINEAR), dtype=torch.int8),
            torch.ones(n, dtype=torch.float64) if slopes is None else slopes,
            torch.zeros(n, dtype=torch.float64) if offsets is None else offsets,
        )

    @classmethod
    def narrow(cls, site: Site, kept: Tensor, constants: Tensor | None = None, fit: Fit | None = None) -> Entry:
        """The channels `kept` (indices or a mask) stay, the others are dropped and become `constants` (n,), or 0."""
        n = site.width
        fates = torch.full((n,), int(Fate.DROP), dtype=torch.int8)
        fates[kept.cpu()] = int(Fate.KEEP)
        zeros = torch.zeros(n, dtype=torch.float64)
        return cls(site, fates, torch.ones(n, dtype=torch.float64), zeros if constants is None else constants, fit=fit)

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


@dataclass(frozen=True, eq=False)
class Plan:
    """An ordered list of entries, each relative to the model after the earlier ones.

        plan = sh.Plan.collapse(sites)
        print(plan)
        plan.save("plan/")
        small = sh.apply(model, sh.Plan.load("plan/"), example_inputs)

    Overlapping sites (the consumer of one is the producer of the next) are always applied in the order in which the
    network runs them. Only a fitted linear path notices: it reads what the earlier site leaves.

    Attributes:
        entries: at most one per site.
        fingerprint: of the weights the plan was made for (`fingerprint` in fingerprints.py); "" where it depends on no
            weights (a plain collapse).
        method: which method made it, for people.

    Raises:
        PlanError: entries contradict one another.
    """

    entries: tuple[Entry, ...]
    fingerprint: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        names = [entry.site.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise PlanError(f"{name}: the plan has two entries for this site")
        steps(self.entries)

    @classmethod
    def collapse(cls, sites: Iterable[Site], names: Iterable[str] | None = None) -> Plan:
        """Every channel of these sites linear with slope 1: the plain collapse to one linear map for each consumer.

        Args:
            sites: what to collapse.
            names: only the sites of these names.

        Raises:
            PlanError: a site cannot be linear, or there is no site of that name.

        Warns:
            CostWarning: a site does not become cheaper.
        """
        chosen = list(sites)
        if names is not None:
            wanted = [names] if isinstance(names, str) else list(names)
            known = {site.name for site in chosen}
            for name in wanted:
                if name not in known:
                    raise PlanError(f"there is no site {name!r} to collapse")
            chosen = [site for site in chosen if site.name in wanted]
        plan = cls(tuple(Entry.collapse(site) for site in chosen), method="collapse")
        plan.warn_of_cost()
        return plan

    def __len__(self) -> int:
        return len(self.entries)

    def warn_of_cost(self) -> None:
        """Warn of every site that takes neither fewer parameters nor fewer MACs than it has."""
        for step in steps(self.entries):
            form = step.form
            if not form.cheaper and form.kind != "narrower":
                warnings.warn(
                    f"{step.entry.site.name}: as planned it has {amount(form.params)} parameters and "
                    f"{amount(form.macs)} MACs, and it had {amount(form.params_before)} and "
                    f"{amount(form.macs_before)}. It is exact, but no cheaper: only sites that widen pay",
                    CostWarning,
                    stacklevel=3,
                )

    @property
    def params_saved(self) -> int:
        """How many parameters fewer the model has with all entries applied."""
        return sum(step.form.params_before - step.form.params for step in steps(self.entries))

    @property
    def macs_saved(self) -> int:
        """How many MACs fewer the model needs on the example inputs with all entries applied."""
        return sum(step.form.macs_before - step.form.macs for step in steps(self.entries))

    def __str__(self) -> str:
        """A table: site, fates, the form it takes, params and MACs before and after."""
        header = ("site", "keep", "linear", "drop", "becomes", "params", "after", "MACs", "after")
        rows = []
        for step in steps(self.entries):
            entry, form = step.entry, step.form
            counts = [str(len(i)) if len(i) else "" for i in (entry.kept, entry.linear, entry.dropped)]
            costs = [form.params_before, form.params, form.macs_before, form.macs]
            path = (
                f" + path of {form.rank}" if form.kind == "partial" else f" of rank {form.rank}" * (form.kind == "pair")
            )
            rows.append((entry.site.name, *counts, f"{form.kind}{path}", *[amount(cost) for cost in costs]))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, 4) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        made_by = f" by {self.method}" if self.method else ""
        saved = f"{_signed(-self.params_saved)} params, {_signed(-self.macs_saved)} MACs"
        return "\n".join([f"plan{made_by} for {len(self)} sites: {saved}", *(lines if rows else [])])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; tensors are named by their shape and hash (docs/format.md)."""
        from shallower.plan_file import plan_to_json

        return plan_to_json(self)[0]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan that `to_json` described.

        Args:
            data: the description.
            tensors: the tensors that it names.

        Raises:
            PlanError: it is not the description of a plan, or a tensor is missing or another one.
        """
        from shallower.plan_file import plan_from_json

        return plan_from_json(data, tensors or {})

    def save(self, directory: str | Path) -> None:
        """Write plan.json and plan.safetensors into `directory`, which is made if there is none.

        Raises:
            PlanError: it cannot be written.
        """
        from shallower.plan_file import save_plan

        save_plan(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: there is no plan, or it is damaged, of an unknown version or not a plan at all.
        """
        from shallower.plan_file import load_plan

        return load_plan(Path(directory))


def _signed(count: int) -> str:
    return f"{'-' if count < 0 else '+'}{amount(abs(count))}"


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
    if site.producer is None:
        raise PlanError(f"{site.name}: an activation place has no maps to fit")
    consumers = tuple(fit.consumers)
    if not consumers and kept == 0:
        consumers = tuple(torch.zeros(c.d_out, 0, *_kernel(c.kind, c.kernel)) for c in site.consumers)
    for name, given in (("consumers", consumers), ("biases", fit.biases), ("ups", fit.ups or site.consumers)):
        if len(given) != len(site.consumers):
            raise PlanError(f"{site.name}: the fit has {len(given)} {name} for {len(site.consumers)} consumers")
    fitted = Fit(consumers, tuple(fit.biases), fit.down, tuple(fit.ups))
    for name, tensor in fitted.tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PlanError(f"{site.name}: {name} of the fit is not a tensor of finite floating-point numbers")
    if fitted.down is not None and not fitted.ups:
        raise PlanError(f"{site.name}: the fit has the first half of a linear path but not the second (ups)")
    if fitted.down is not None:
        down = _with_kernel(fitted.down, site.producer.kind)
        kernel = _kernel(site.producer.kind, site.producer.kernel)
        if down.dim() != 2 + len(kernel) or down.shape[0] < 1 or down.shape[2:] != kernel:
            raise PlanError(f"{site.name}: down of the fit has shape {tuple(fitted.down.shape)}, not (rank, d_in)")
        fitted = Fit(fitted.consumers, fitted.biases, down, fitted.ups)
    ups = []
    for i, c in enumerate(site.consumers):
        wanted = (c.d_out, kept, *_kernel(c.kind, c.kernel))
        if tuple(consumers[i].shape) != wanted:
            raise PlanError(
                f"{site.name}: consumers.{i} of the fit has shape {tuple(consumers[i].shape)}; `{c.name}` with {kept} "
                f"kept channels needs {wanted}"
            )
        if tuple(fit.biases[i].shape) != (c.d_out,):
            raise PlanError(
                f"{site.name}: biases.{i} of the fit has shape {tuple(fit.biases[i].shape)}, not ({c.d_out},)"
            )
        if fitted.ups:
            up = _with_kernel(fitted.ups[i], c.kind)
            rank = up.shape[1] if fitted.down is None else fitted.down.shape[0]
            geometry = composed(site.producer, c, True) if fitted.down is None else c
            kernel = _kernel(c.kind, geometry.kernel)
            if tuple(up.shape) != (c.d_out, rank, *kernel):
                raise PlanError(
                    f"{site.name}: ups.{i} of the fit has shape {tuple(fitted.ups[i].shape)}, "
                    f"not {(c.d_out, rank, *kernel)}"
                )
            ups.append(up)
    return Fit(fitted.consumers, fitted.biases, fitted.down, tuple(ups))


def _kernel(kind: str, kernel: tuple[int, int]) -> tuple[int, ...]:
    """What a weight's shape has behind (d_out, d_in)."""
    return tuple(kernel) if kind == "conv2d" else ()


def _with_kernel(weight: Tensor, kind: str) -> Tensor:
    """A (d_out, d_in) matrix of a 1x1 convolution as its weight."""
    return weight[:, :, None, None] if kind == "conv2d" and weight.dim() == 2 else weight
