"""Coupled sites squeezed: which channels go by all that reads them, and the readers fitted to what stays.

    coupling = Coupling(dense, sites, calibration)
    curves = coupling.curves(metrics)               # by site, the error at every width
    cuts = coupling.cuts(widths)                    # entries without a fit
    silence(small, cuts)                            # in the squeezed network their channels are zeros from now on

The channels go first, all at once; then each reader is fitted in the order of execution, by least squares, towards what
the dense network returns there, in the network whose earlier readers and sites are squeezed already. A reader that
makes the channels of a narrowed site is fitted with this site; the others become entries of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Centred, ridge_error
from shallower.calibrating.joint import Part, eliminate_jointly
from shallower.calibrating.metrics import Metric
from shallower.calibrating.patches import unusual_padding
from shallower.calibrating.selection import Elimination
from shallower.calibrating.site_grams import SiteGrams
from shallower.core.inputs import call, model_device
from shallower.core.modes import evaluating
from shallower.core.watching import read, watching
from shallower.errors import FitError, Refusal, SiteError
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.coupled.readers import Reader, is_coupled, readers_of, reads_as_described
from shallower.methods.squeezing.refitting import damage, has_intercept, metric_of
from shallower.modules.layers import weight_of
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.sites import LinearMap, Site

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MEMORY = 1 << 28
"""Bytes of Gram matrices that are held at a time."""


class Coupling:
    """The coupled ones of some sites, and what reads them.

    Attributes:
        sites: those that are coupled.
        readers: by site, what reads its channels.
    """

    def __init__(self, dense: nn.Module, sites: Iterable[Site], calibration: Calibration) -> None:
        self.dense = dense
        self.calibration = calibration
        self.sites = [site for site in sites if is_coupled(site)]
        self.readers: dict[str, list[Reader]] = {site.name: readers_of(dense, site) for site in self.sites}
        self._orders: dict[str, Elimination] = {}

    def read(self, sites: Iterable[Site]) -> list[Site]:
        """All readers of these coupled sites, each once, as sites of their own."""
        found: dict[str, Site] = {}
        for site in sites:
            for reader in self.readers.get(site.name, ()):
                found[reader.site.name] = reader.site
        return list(found.values())

    def curves(self, metrics: Mapping[str, Centred]) -> dict[str, dict[int, float]]:
        """The error at every width of every coupled site, in units of the model's output.

        Raises:
            FitError: the calibration data are too few or not finite.
        """
        found: dict[str, dict[int, float]] = {}
        for group in self._fitting_in_memory():
            grams = self.calibration.grams(self.dense, None, self.read(group))
            for site in group:
                parts = self._parts(site, grams, metrics)
                if isinstance(parts, Refusal):
                    found[site.name] = {site.width: 0.0}
                    self.calibration.refused[site.name] = str(parts)
                    continue
                whole = sum(part.whole for part in parts)
                order = self._orders[site.name] = eliminate_jointly(parts, site.least)
                widths = range(site.least, site.width + 1)
                found[site.name] = {width: damage(order.error(width), whole) for width in widths}
        return found

    def _fitting_in_memory(self) -> list[list[Site]]:
        """The sites in groups whose readers' moments fit into memory together."""
        groups: list[list[Site]] = []
        room = 0
        for site in self.sites:
            needed = sum(16 * (reader.map.d_in * reader.map.taps) ** 2 for reader in self.readers[site.name])
            if needed > room:
                groups.append([])
                room = _MEMORY
            groups[-1].append(site)
            room -= needed
        return groups

    def _parts(
        self, site: Site, grams: Mapping[str, SiteGrams | Refusal], metrics: Mapping[str, Centred]
    ) -> list[Part] | Refusal:
        """What each reader loses without channels; or why one of them cannot be calibrated."""
        parts: list[Part] = []
        for reader in self.readers[site.name]:
            own = grams[reader.site.name]
            if isinstance(own, Refusal):
                return Refusal(f"`{reader.map.name}`: {own}")
            scale = 1.0
            if self.calibration.options.sensitivity:
                scale = float(reader.map.positions)
            metric = metric_of(reader.site, metrics, own)
            columns = reader.columns(torch.arange(site.width))
            weight = weight_of(self.dense.get_submodule(reader.map.name)).flatten(1).double()
            ridge = _trusted_ridge(reader.site, own, metric, weight, columns)
            zz = own.all.centred(has_intercept(reader.site)).zz
            parts.append(Part.of(zz, weight, metric, ridge=ridge, columns=columns, scale=scale))
        return parts

    def cuts(self, widths: Mapping[str, int], metrics: Mapping[str, Centred]) -> list[Entry]:
        """Entries that leave so many channels of the coupled sites, without a fit."""
        found: list[Entry] = []
        for site in self.sites:
            width = widths[site.name]
            if width == site.width:
                continue
            if site.name not in self._orders:
                self.curves(metrics)
            found.append(Entry.narrow(site, self._orders[site.name].kept(width).cpu(), note="by all that reads it"))
        return found


def not_described(dense: nn.Module, sites: Sequence[Site], calibration: Calibration) -> dict[str, str]:
    """Why coupled sites cannot be squeezed, by name: a reader is no layer, or not what its geometry says.

    One pass over the first batch.
    """
    found: dict[str, str] = {}
    readers: dict[str, LinearMap] = {}
    behind: dict[str, list[str]] = {}
    for site in sites:
        try:
            own = readers_of(dense, site)
        except SiteError as error:
            found[site.name] = str(error)
            continue
        for reader in own:
            readers[reader.map.name] = reader.map
            behind.setdefault(reader.map.name, []).append(site.name)

    def check(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = read(args, kwargs)
        padding = unusual_padding(module)
        if padding is not None:
            x = padding(x)
        if not reads_as_described(module, readers[name], x, output):
            for site in behind[name]:
                found[site] = f"`{name}` reads its channels, and not as its weight and geometry say"

    with evaluating(dense), watching(dense, after={name: partial(check, name) for name in readers}):
        call(dense, calibration.batches[0].on(model_device(dense)).inputs)
    return found


def silence(small: nn.Module, cuts: Iterable[Entry]) -> None:
    """Let the dropped channels of coupled sites be zeros: in every tensor in which they stand, and in added biases.

    The tensors get memory of their own.
    """
    for entry in cuts:
        for slot in entry.site.slots:
            module = small.get_submodule(slot.module)
            gone = slot.positions(entry.dropped)
            _fill(module, slot.attribute, slot.axis, gone)
            if slot.side == "rows" and isinstance(getattr(module, "bias", None), Tensor):
                _fill(module, "bias", 0, gone)


def _fill(module: nn.Module, attribute: str, axis: int, gone: Tensor) -> None:
    tensor: Tensor = getattr(module, attribute)
    filled = tensor.detach().clone().index_fill_(axis, gone.to(tensor.device), 0)
    _set_tensor(module, attribute, filled)


def _set_tensor(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Exchange a parameter or buffer."""
    if attribute in module._parameters:
        own = module._parameters[attribute]
        module._parameters[attribute] = nn.Parameter(value, requires_grad=own is not None and own.requires_grad)
    else:
        module._buffers[attribute] = value


def outputs_gone(site: Site, cuts: Iterable[Entry]) -> Tensor:
    """(m,) int64, which outputs of a site's consumers, side by side, are channels that go."""
    found = [torch.empty(0, dtype=torch.int64)]
    start = 0
    for m in site.consumers:
        for entry in cuts:
            for slot in entry.site.slots:
                if slot.module == m.name and slot.attribute == "weight" and slot.side == "rows":
                    found.append(start + slot.positions(entry.dropped))
        start += m.d_out
    return torch.tensor(sorted(set(torch.cat(found).tolist())), dtype=torch.int64)


def in_order(
    dense: nn.Module, sites: Sequence[Site], readers: Sequence[Site], calibration: Calibration
) -> list[Site]:  # fmt: skip
    """The sites in their order, each reader between them before what runs after it; one pass over the first batch."""
    clock: dict[str, int] = {}

    def before(name: str, *_: Any) -> None:
        clock.setdefault(name, len(clock))

    hooks = {m.name: partial(before, m.name) for item in (*sites, *readers) for m in item.consumers}
    with evaluating(dense), watching(dense, before=hooks):
        call(dense, calibration.batches[0].on(model_device(dense)).inputs)
    ticks = {reader.name: clock.get(reader.consumers[0].name, -1) for reader in readers}
    now = -1
    for site in sites:
        now = max(now, min(clock.get(m.name, -1) for m in site.consumers))
        ticks[site.name] = now
    return sorted([*readers, *sites], key=lambda item: ticks[item.name])


def read_anew(item: Site, grams: SiteGrams, metric: Metric, small: nn.Module, intercept: bool) -> Entry:
    """A reader fitted to the channels that stay, or with its weights as they are where held-out rows say so.

    Args:
        item: the reader as a site of its own.
        grams: of what it reads in `small` and should return.
        metric: weight of errors.
        small: with the channels that go as zeros.
        intercept: whether there is a shift that can be fitted.

    Raises:
        FitError: the calibration data are too few or not finite.
    """
    (m,) = item.consumers
    moments = grams.all.centred(intercept)
    weight = weight_of(small.get_submodule(m.name)).flatten(1).double().to(moments.mean_z)
    ridge, error = _best_change(grams, metric, weight, intercept)
    if math.isfinite(ridge):
        weight = weight + moments.beyond(weight).fit(ridge)
    bias = moments.mean_y - weight @ moments.mean_z
    if m.kind == "conv2d":
        weight = weight.reshape(len(weight), -1, *m.kernel)
    fit = Fit((weight.cpu(),), (bias.cpu(),))
    note = "fitted to the channels that stay"
    return Entry.narrow(item, range(item.width), fit=fit, note=note, error=error if math.isfinite(error) else None)


def _best_change(grams: SiteGrams, metric: Metric, weight: Tensor, intercept: bool) -> tuple[float, float]:
    """The ridge of the change of a weight with the least error on held-out rows, and that as a part of the variance.

    Infinity where no change is best, or nothing is held out. A ridge towards the weight as it is, and not towards
    zeros: it holds for all data, and of few rows, pixels of the same images, a fit from nothing learns these rows.
    """
    if grams.fit.count < 2 or grams.held.count < 2:
        return math.inf, math.inf
    fit, held = (gram.centred(intercept).beyond(weight) for gram in (grams.fit, grams.held))
    variance = float((grams.held.centred(intercept).yy * metric.diagonal).sum())
    best, least = math.inf, float((held.yy * metric.diagonal).sum())
    for ridge in _RIDGES:
        try:
            error = ridge_error(fit, held, ridge, metric.diagonal)
        except FitError:
            continue
        if error < least:
            best, least = ridge, error
    return best, least / max(variance, torch.finfo(torch.float64).tiny)


def _trusted_ridge(reader: Site, grams: SiteGrams, metric: Metric, weight: Tensor, columns: Tensor) -> float:
    """The ridge with which held-out rows are predicted best without every other channel."""
    intercept = has_intercept(reader)
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    stays[columns[::2].flatten()] = False
    kept = stays.nonzero().flatten().to(grams.fit.device)
    half = replace(grams, fit=grams.fit.part(kept), held=grams.held.part(kept))
    left = weight.to(grams.fit.device)[:, kept]
    return min(_best_change(half, metric, left, intercept)[0], _RIDGES[-1])


def set_rows(small: nn.Module, site: Site, fitted: Entry) -> None:
    """Give the producer of a site the weights of a fit, and the shift behind it."""
    assert site.producer is not None
    assert fitted.fit is not None
    layer = small.get_submodule(site.producer.name)
    (weight,), (bias,) = fitted.fit.consumers, fitted.fit.biases
    own = weight_of(layer)
    _set_tensor(layer, "weight", weight.to(own))
    shifted, attribute = _shift_of(small, site)
    if attribute:
        given: Tensor = getattr(shifted, attribute)
        if shifted is not layer:
            bias = given.detach().to(bias) + bias * _scale_of(shifted).to(bias)
        _set_tensor(shifted, attribute, bias.to(given))


def has_shift(small: nn.Module, site: Site) -> bool:
    """Whether what the producer of a site gives can be shifted."""
    return bool(_shift_of(small, site)[1])


def _shift_of(small: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """The module, the BatchNorm behind the producer or the producer itself, that has a shift; "" where none has."""
    assert site.producer is not None
    module = small.get_submodule(site.bridge.norm_before or site.producer.name)
    if isinstance(getattr(module, "bias", None), Tensor):
        return module, "bias"
    return module, ""


def with_rows(entry: Entry, small: nn.Module) -> Entry:
    """A narrowed site's entry with the rows that its producer has in `small`, where nothing else was fitted."""
    site, fit = entry.site, entry.fit
    assert site.producer is not None
    assert fit is not None
    if fit.producer is not None:
        return entry
    rows = weight_of(small.get_submodule(site.producer.name)).detach()[entry.kept].cpu()
    shifted, attribute = _shift_of(small, site)
    shift = None
    if attribute:
        shift = getattr(shifted, attribute).detach()[entry.kept].cpu()
    return replace(entry, fit=replace(fit, producer=rows, producer_bias=shift))


def _scale_of(norm: nn.Module) -> Tensor:
    """(n,) what a BatchNorm in evaluation multiplies by."""
    given: Any = norm
    scale: Tensor = (given.running_var.detach().double() + given.eps).rsqrt()
    if isinstance(given.weight, Tensor):
        scale = scale * given.weight.detach().double()
    return scale
