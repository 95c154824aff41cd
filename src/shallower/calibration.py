"""What calibration data tell about a site as a whole: Gram matrices of what its consumers read and should give.

    grams = collect_grams(dense, small, sites, batches)     # {site name: SiteGrams}

Only sums are kept, in float64, so that memory does not grow with the data, and Gram matrices of several batches, data
sets or machines are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shallower.errors import FitError, SiteError
from shallower.inputs import InputsOf, call, default_inputs_of, model_device, reiterable, tensors, to_device
from shallower.residual import ResidualSums
from shallower.sites import LinearMap, Site
from shallower.statistics import MaskOf, default_mask_of, evaluating

_ROWS = 1 << 13
"""Rows that are converted to float64 at a time."""

_PER_COLUMN = 64
"""Positions of a convolution that are used, for each column of its patches: neighbours tell nearly the same."""

HELD_OUT = 4
"""One row of so many is kept apart, to choose by."""


@dataclass(frozen=True)
class Gram:
    """Sums over positions of z, y and their products: all that least squares from z to y needs.

        total = Gram.of(z, y) + Gram.of(z2, y2)

    Attributes:
        count: positions seen.
        z, y: (n,) and (d,) float64, sums.
        zz, zy: (n, n) and (n, d) float64, sums of products.
        yy: (d,) float64, sums of squares.
    """

    count: float
    z: Tensor
    y: Tensor
    zz: Tensor
    zy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor) -> Gram:
        """Of samples: z (positions, n) and y (positions, d), of any dtype."""
        total = cls.empty(z.shape[1], y.shape[1], z.device)
        for z_part, y_part in zip(torch.split(z, _ROWS), torch.split(y, _ROWS), strict=True):
            a, b = z_part.double(), y_part.double()
            total = total + cls(float(len(a)), a.sum(0), b.sum(0), a.T @ a, a.T @ b, b.square().sum(0))
        return total

    @classmethod
    def empty(cls, n: int, d: int, device: torch.device | str = "cpu") -> Gram:
        """Of nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0.0, zeros(n), zeros(d), zeros(n, n), zeros(n, d), zeros(d))

    def __add__(self, other: Gram) -> Gram:
        """Of both samples together."""
        if self.zy.shape != other.zy.shape:
            raise FitError("Gram matrices of different sites do not add up")
        return Gram(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def over_processes(self) -> Gram:
        """Of the samples of all processes of `torch.distributed`; itself where there is one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        count = torch.tensor([self.count], dtype=torch.float64, device=self.z.device)
        sums = [count, *(getattr(self, field.name).clone() for field in fields(self)[1:])]
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
        return Gram(float(sums[0]), *sums[1:])

    def centred(self, intercept: bool = True) -> Centred:
        """Means and second moments; about the means where the fit has an intercept, about 0 where it has none.

        Raises:
            FitError: nothing was seen, or something was not finite.
        """
        if self.count < 2:
            raise FitError(f"{self.count:.0f} positions were seen: too few calibration data to fit anything")
        if not all(bool(t.isfinite().all()) for t in (self.z, self.y, self.zz, self.zy, self.yy)):
            raise FitError("a value is not finite: does the model overflow on the calibration batches?")
        mean_z, mean_y = self.z / self.count, self.y / self.count
        if not intercept:
            mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
        return Centred(
            self.zz / self.count - mean_z[:, None] * mean_z,
            self.zy / self.count - mean_z[:, None] * mean_y,
            (self.yy / self.count - mean_y.square()).clamp_min(0),
            mean_z,
            mean_y,
        )


@dataclass(frozen=True)
class Centred:
    """Moments for a least-squares fit y = W (z - mean_z) + mean_y.

    Attributes:
        zz, zy: (n, n) and (n, d) float64.
        yy: (d,) float64, of each output.
        mean_z, mean_y: (n,) and (d,); zero where the fit has no intercept.
    """

    zz: Tensor
    zy: Tensor
    yy: Tensor
    mean_z: Tensor
    mean_y: Tensor


@dataclass(frozen=True)
class SiteGrams:
    """What was seen at one site; rows for fitting and rows that are held out.

    Attributes:
        fit, held: from what the consumers read (patches of it, for a convolution) to what they should give.
        inputs: (fit, held) from what the producer reads, for a full collapse; None where that was not asked for.
    """

    fit: Gram
    held: Gram
    inputs: tuple[Gram, Gram] | None = None

    def over_processes(self) -> SiteGrams:
        """Of all processes together."""
        inputs = None if self.inputs is None else (self.inputs[0].over_processes(), self.inputs[1].over_processes())
        return SiteGrams(self.fit.over_processes(), self.held.over_processes(), inputs)

    @property
    def all(self) -> Gram:
        """All rows."""
        return self.fit + self.held


def collect_grams(
    dense: nn.Module,
    small: nn.Module | None,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    compensation: float = 0.0,
    with_inputs: bool = False,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, SiteGrams]:
    """Gram matrices of the sites, by name: what the consumers read in `small`, against what they give in `dense`.

    Of each batch, the passes stop at the last of the sites.

    Args:
        dense: the model as it is.
        small: the model with the earlier sites squeezed already; None for `dense` itself.
        sites: that have not been squeezed yet, in both models.
        batches: read once here, but a one-shot iterator is refused.
        compensation: where a consumer's output is added to a residual stream, this part of the difference between the
            two models' streams is added to what the consumer should give.
        with_inputs: also of what the producer reads.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`.

    Raises:
        SiteError: a site did not run as it did when it was found, or the batches cannot be read again.
        FitError: there are no batches or just one sample, or a value is not finite; the error names the site.
    """
    reiterable(batches)
    share = len(batches) if isinstance(batches, Sized) else 1
    device = model_device(dense)
    sums: dict[str, list[Gram]] = {}
    samples = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(dense))
        target = stack.enter_context(_Watch(dense, sites))
        source = target
        if small is not None:
            stack.enter_context(evaluating(small))
            source = stack.enter_context(_Watch(small, sites))
        for batch in tqdm(batches, desc="calibrating", delay=5, leave=False):
            mask = default_mask_of(batch) if mask_of is None else mask_of(batch)
            inputs = to_device(inputs_of(batch), device)
            samples += _samples(inputs)
            target.run(inputs)
            if source is not target:
                source.run(inputs)
            rows = _Rows(None if mask is None else mask.to(device).bool().flatten(), share)
            for site in sites:
                seen = rows.grams(site, source, target, compensation, with_inputs)
                old = sums.get(site.name)
                sums[site.name] = seen if old is None else [a + b for a, b in zip(old, seen, strict=True)]
    if samples < 2:
        raise FitError(
            f"{'one sample is' if samples else 'no batches are'} too little to calibrate on; give a few hundred samples"
        )
    found = {}
    for site in sites:
        fit, held, *inputs_grams = sums[site.name]
        pair = (inputs_grams[0], inputs_grams[1]) if inputs_grams else None
        found[site.name] = SiteGrams(fit, held, pair).over_processes()
        if not bool(found[site.name].all.zz.isfinite().all()):
            raise FitError(
                f"{site.name}: what its consumer `{site.consumers[0].name}` reads is not finite on the calibration "
                "batches; does the model overflow, or do the batches hold NaN?"
            )
    return found


class _Finished(Exception):  # noqa: N818 (it is no error)
    """All sites have run: the rest of the forward pass is of no use."""


class _Watch:
    """Records what the maps of some sites read and give while a model runs; the pass stops after the last of them."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model = model
        self.sites = sites
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.others: dict[str, list[Tensor | None]] = {}
        self._handles: list[Any] = []
        self._sums = _Sums(self)
        self._wanted = {site.consumers[-1].name: site.calls for site in sites}
        self._follows: list[str] = []

    def __enter__(self) -> _Watch:
        for site in self.sites:
            for m in site.consumers:
                self._hook(m, follow=True)
            if site.producer is not None:
                self._hook(site.producer, follow=False)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, m: LinearMap, *, follow: bool) -> None:
        module = self.model.get_submodule(m.name)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.setdefault(m.name, []).append(next(tensors((args, kwargs))).detach().clone())

        def after(_: nn.Module, _args: Any, output: Tensor) -> None:
            self.outputs.setdefault(m.name, []).append(output.detach().clone())
            self._follows.append(m.name)
            self._sums.follow(output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if follow:
            self._handles.append(module.register_forward_hook(after))

    def run(self, inputs: Any) -> None:
        """One forward pass, as far as it is needed."""
        self.inputs, self.outputs, self.others, self._follows = {}, {}, {}, []
        self._sums = _Sums(self)
        try:
            with self._sums:
                call(self.model, inputs)
        except _Finished:
            pass
        for name, other in zip(self._follows, self._sums.others, strict=True):
            self.others.setdefault(name, []).append(other)

    def complete(self) -> bool:
        """Whether every consumer has run as often as it does in a pass."""
        return all(len(self.outputs.get(name, [])) >= calls for name, calls in self._wanted.items())


class _Sums(ResidualSums):
    """Ends the pass one call after the last residual sum."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stop where nothing is left to follow."""
        result = super().__torch_function__(func, types, args, kwargs)
        if not self.followed and self._watch.complete():
            raise _Finished
        return result


@dataclass(frozen=True)
class _Rows:
    """Makes rows of what a batch's tensors hold, and Gram matrices of them.

    Attributes:
        mask: positions that count, flattened; None for all.
        share: batches that there are.
    """

    mask: Tensor | None
    share: int

    def grams(self, site: Site, source: _Watch, target: _Watch, compensation: float, with_inputs: bool) -> list[Gram]:
        """(fit, held) of the consumers' inputs and, where asked for, of the producer's, of one batch."""
        names = [m.name for m in site.consumers]
        calls = len(target.outputs.get(names[0], []))
        ran = [*(len(target.outputs.get(n, [])) for n in names), *(len(source.inputs.get(n, [])) for n in names)]
        if calls == 0 or any(count != calls for count in ran):
            raise SiteError(
                f"{site.name}: its consumers did not run alike on this batch; is this the model that the sites were "
                "found in, and are the batches like the example inputs?"
            )
        total: list[Gram] | None = None
        for i in range(calls):
            wanted = []
            for name in names:
                y = target.outputs[name][i]
                there, here = target.others[name][i], source.others[name][i]
                if compensation and there is not None and here is not None:
                    y = y + compensation * (there - here)
                wanted.append(_flat(y, site.consumers[0].kind == "conv2d"))
            y = torch.cat(wanted, 1)
            seen = self._pair(patches(source.inputs[names[0]][i], site.consumers[0]), y, site.consumers[0].taps)
            if with_inputs and site.producer is not None:
                seen += self._pair(_flat(source.inputs[site.producer.name][i], False), y, 1)
            total = seen if total is None else [a + b for a, b in zip(total, seen, strict=True)]
        return total or []

    def _pair(self, z: Tensor, y: Tensor, taps: int) -> list[Gram]:
        if self.mask is not None and len(self.mask) == len(z):
            z, y = z[self.mask], y[self.mask]
        if taps > 1:
            step = max(1, len(z) * self.share // (_PER_COLUMN * z.shape[1]))
            z, y = z[::step], y[::step]
        cut = len(z) - len(z) // HELD_OUT
        return [Gram.of(z[:cut], y[:cut]), Gram.of(z[cut:], y[cut:])]


def patches(z: Tensor, m: LinearMap) -> Tensor:
    """What each output position of a map reads: (positions, d_in * taps), the taps of a channel beside one another."""
    if m.kind != "conv2d":
        return _flat(z, False)
    if m.taps == 1 and m.padding == (0, 0):
        return _flat(z[:, :, :: m.stride[0], :: m.stride[1]], True)
    columns = F.unfold(z, m.kernel, dilation=m.dilation, padding=m.padding, stride=m.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _flat(t: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels)."""
    if channels_first:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])


def _samples(inputs: Any) -> int:
    first = next(tensors(inputs), None)
    return 0 if first is None else len(first) if first.dim() else 1
