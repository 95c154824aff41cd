"""The edits of one step of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.core.algebra import grouped, scale_rows, unrolled, with_skip
from shallower.errors import PlanError
from shallower.modules import heads
from shallower.modules.activations import PartialActivation, SlopeActivation
from shallower.modules.edits import perform, resize
from shallower.modules.layers import bias_of, fill_norm, is_the_map, weight_of
from shallower.modules.offloading import own_weights
from shallower.modules.rewriting import externalise
from shallower.planning.entries import Entry, Fate, Fit
from shallower.planning.forms import Form, Step
from shallower.sites import LinearMap, Place, Residual, Site
from shallower.surgery.padding import zeros_around
from shallower.surgery.paths import Path, affine, as_read, columns_of, composed, gate_rows_of, path_of, up_rows_of


def operate(model: nn.Module, step: Step) -> None:
    """Give one site of the model, in place, the form that `step` says."""
    entry, form = step.entry, step.form
    site = entry.site
    if site.kind == "heads":
        fitted = () if entry.fit is None else (entry.fit.consumers[0], entry.fit.biases[0])
        heads.narrow(model, site, entry.kept, *fitted)
        return
    if site.producer is None or form.kind == "removed":
        _vanish(model, site.activation)
        return
    if form.kind == "apart" and any(m.groups > 1 for m in form.maps):
        _set_apart(model, entry, form)
        return
    producer = model.get_submodule(site.producer.name)
    consumers = [model.get_submodule(m.name) for m in site.consumers]
    path = path_of(model, entry, form, producer, consumers)
    if form.kind == "merged":
        _merge(model, entry, form, producer, path)
    elif form.kind in ("pair", "apart"):
        _pair(model, site, form, path)
    else:
        _narrow(model, entry, form, path)


def _merge(model: nn.Module, entry: Entry, form: Form, producer: nn.Module, path: Path) -> None:
    site = entry.site
    if site.flattened:
        weights = [
            _unrolled(site, up, cast("Tensor", path.down), producer, m)
            for up, m in zip(path.ups, form.consumers, strict=True)
        ]
    else:
        read = zip(path.ups, _consumers(model, site), strict=True)
        weights = [composed(up, path.down, producer, m) for up, m in read]
    if entry.fold_skip:
        _take_in_skip(model, cast("Residual", site.residual), weights, path.biases)
    for m, weight, bias in zip(form.consumers, weights, path.biases, strict=True):
        _set(_become(model, m), columns=[grouped(weight, m.groups)], bias=[bias])
    width = form.consumers[0].d_in
    if site.packed:
        perform(model, {"edit": "twice", "name": _name(site.producer), "channels_first": site.channels_first})
    else:
        perform(model, {"edit": "identity", "name": _name(site.producer)})
    _clear(model, site, width)


def _take_in_skip(model: nn.Module, residual: Residual, weights: list[Tensor], biases: list[Tensor]) -> None:
    """Let the one merged map do what the sum behind it does, and take the sum away."""
    norm = affine(model, residual.norm)
    if norm is not None:
        weights[0], biases[0] = scale_rows(weights[0], norm[0]), biases[0] * norm[0] + norm[1]
        perform(model, {"edit": "identity", "name": residual.norm})
    weights[0] = with_skip(weights[0])
    name = _module_at(model, residual.place)
    perform(model, {"edit": "operand", "name": name, "index": residual.branch})


def _pair(model: nn.Module, site: Site, form: Form, path: Path) -> None:
    down = cast("Tensor", path.down)
    if len(down) == 0:  # nothing is left but a constant: a layer needs at least one channel
        down = down.new_zeros(1, *down.shape[1:])
        path.shift = None
        path.ups = [up.new_zeros(up.shape[0], site.block, *up.shape[2:]) for up in path.ups]
    producer = _become(model, cast("LinearMap", form.producer))
    halves = [torch.zeros_like(down), down] if site.packed == "gate-first" else [down, torch.zeros_like(down)]
    _set(producer, rows=halves if site.packed else [down], bias=[] if path.shift is None else [path.shift])
    for m, up, bias in zip(form.consumers, path.ups, path.biases, strict=True):
        _set(_become(model, m), columns=[up], bias=[bias])
    _clear(model, site, form.width)


def _set_apart(model: nn.Module, entry: Entry, form: Form) -> None:
    """Grouped convolutions with nothing between them: every channel stays, and the producer does all that was there."""
    site, made = entry.site, cast("LinearMap", form.producer)
    everything = torch.arange(site.width)
    slopes = torch.where(entry.fates == Fate.LINEAR, entry.slopes, 0.0)
    producer = model.get_submodule(made.name)
    rows, shift, _ = as_read(model, replace(entry, slopes=slopes), producer, everything, everything[:0])
    _set(_become(model, made), rows=[grouped(rows, made.groups)], bias=[shift])
    _clear(model, site, site.width)


def _clear(model: nn.Module, site: Site, width: int) -> None:
    """Take away all that stood between the two linear maps; a gate becomes ones of that width."""
    if site.gate is not None:
        perform(model, {"edit": "identity", "name": site.gate.name})
    name = _vanish(model, site.activation)
    if site.gated:
        gate = "packed" if site.packed else "separate"
        _partial(model, name, 0, width, gate, site.channels_first)
    for norm in (site.norm_before, site.norm_after):
        if norm:
            perform(model, {"edit": "identity", "name": norm})
    for place in site.dropouts:
        _vanish(model, place)


def _narrow(model: nn.Module, entry: Entry, form: Form, path: Path) -> None:
    site, kept, fit = entry.site, entry.kept, entry.fit
    producer = model.get_submodule(_name(site.producer))
    consumers = _consumers(model, site)
    down, ups = _reduced(path, form, producer, consumers)
    if form.kept == site.width and form.rank == 0 and fit is None:
        _set_activation(model, entry, form)
        return

    rows, bias = _kept_rows(producer, up_rows_of(site, kept), fit, "producer", bool(site.norm_before))
    shift = down.new_zeros(form.rank) if path.shift is None else path.shift
    own, shifts = [rows, down], [bias, shift]
    if site.packed:
        gate_rows, gate_bias = _kept_rows(producer, gate_rows_of(site, kept), fit, "gate")
        gates, gate_shifts = [gate_rows, torch.zeros_like(down)], [gate_bias, torch.zeros_like(shift)]
        own = [*gates, *own] if site.packed == "gate-first" else [*own, *gates]
        shifts = [*gate_shifts, *shifts] if site.packed == "gate-first" else [*shifts, *gate_shifts]
    _set(_become(model, cast("LinearMap", form.producer)), rows=own, bias=shifts)

    if site.gate is not None:
        gate_layer = model.get_submodule(site.gate.name)
        weight, gate_bias = _kept_rows(gate_layer, kept, fit, "gate")
        _set(_become(model, cast("LinearMap", form.gate)), rows=[weight], bias=[gate_bias])

    for m in form.between:
        middle = model.get_submodule(m.name)
        weight, own_bias = _kept_rows(middle, kept)
        _set(_become(model, m), rows=[weight], bias=[own_bias])

    for i, (m, consumer) in enumerate(zip(form.consumers, consumers, strict=True)):
        columns = columns_of(site, consumer, kept) if fit is None else fit.consumers[i]
        _set(_become(model, m), columns=[columns, ups[i]], bias=[path.biases[i]])

    behind = [name for b in site.between for name in (b.norm_before, b.norm_after)]
    for name in (site.norm_before, site.norm_after, *behind):
        if name:
            norm = cast("_BatchNorm", model.get_submodule(name))
            narrower = perform(model, {"edit": "norm", "name": name, "channels": form.kept + form.rank})
            fill_norm(cast("_BatchNorm", narrower), norm, kept)
            if name == site.norm_before and fit is not None and fit.producer_bias is not None:
                _set_shift(site, cast("_BatchNorm", narrower), fit.producer_bias)
    _set_activation(model, entry, form)
    for b in site.between:
        if b.activation is not None and form.kept < site.width and _has_channels(model, b.activation, site.width):
            _narrow_activation(model, site, _module_at(model, b.activation), kept)


def _set_shift(site: Site, norm: _BatchNorm, shift: Tensor) -> None:
    """Set the shift of the first channels of a BatchNorm."""
    if norm.bias is None:
        raise PlanError(f"{site.name}: `{site.norm_before}` has no shift that could be fitted")
    with torch.no_grad():
        norm.bias[: len(shift)] = shift.to(norm.bias)


def _kept_rows(
    layer: nn.Module, rows: Tensor, fit: Fit | None = None, role: str = "", shifted: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of these rows of a layer, or what was fitted in their place; zeros where it has no bias.

    Where a BatchNorm behind the layer shifts the channels (`shifted`), the fitted bias is its, not the layer's.
    """
    weight, bias = weight_of(layer)[rows], bias_of(layer)
    shift = weight.new_zeros(len(rows)) if bias is None else bias[rows]
    fitted = {} if fit is None else fit.singles
    return fitted.get(role, weight), shift if shifted else fitted.get(f"{role}_bias", shift)


def _reduced(path: Path, form: Form, producer: nn.Module, consumers: list[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """The same path with fewer channels, where there are fewer inputs or outputs than channels."""
    down, ups = path.down, path.ups
    if form.through == "channels" and down is not None:
        return down, ups
    if form.through == "inputs":
        eye = torch.eye(form.rank, dtype=torch.float64, device=ups[0].device)
        eye = eye[:, :, None, None] if isinstance(producer, nn.Conv2d) else eye
        return eye, ups if down is None else [
            composed(up, down, producer, c) for up, c in zip(ups, consumers, strict=True)
        ]
    full = torch.cat([composed(up, down, producer, c) for up, c in zip(ups, consumers, strict=True)])
    eye = torch.eye(len(full), dtype=torch.float64, device=full.device)
    eye = eye[:, :, None, None] if isinstance(consumers[0], nn.Conv2d) else eye
    return full, list(torch.split(eye, [up.shape[0] for up in ups]))


def _set_activation(model: nn.Module, entry: Entry, form: Form) -> None:
    site, kept = entry.site, entry.kept
    place = site.activation
    if place is None:
        return
    narrower = form.kept < site.width and _has_channels(model, place, site.width)
    if entry.alphas is None and form.rank == 0 and not narrower:
        return
    name = _module_at(model, place)
    if narrower:
        _narrow_activation(model, site, name, kept)
    if entry.alphas is not None:
        alphas = entry.alphas if entry.alphas.numel() == 1 else entry.alphas[kept]
        double = weight_of(model.get_submodule(_name(site.producer))).dtype == torch.float64
        slope = perform(
            model,
            {
                "edit": "slope",
                "name": name,
                "width": alphas.numel() if entry.alphas.numel() > 1 else 0,
                "family": entry.family,
                "target": "one" if site.gated else "identity",
                "channels_first": site.channels_first,
                "dtype": "float64" if double else "float32",
            },
        )
        own = cast("SlopeActivation", slope).to(weight_of(model.get_submodule(_name(site.producer))).device).slope
        with torch.no_grad():
            own.copy_(alphas)
    if form.rank:
        gate = "packed" if site.packed else "separate" if site.gated else ""
        _partial(model, name, form.kept, form.rank, gate, site.channels_first)


def _has_channels(model: nn.Module, place: Place, width: int) -> bool:
    """Whether what stands at a place has parameters for each channel, or is a form of activation that counts them."""
    names = [place.module] if not place.calls else [
        f"{place.module}.{call.removeprefix('self.')}".strip(".") for call, _ in place.calls if call.startswith("self.")
    ]  # fmt: skip
    for name in names:
        f = model.get_submodule(name)
        if isinstance(f, PartialActivation) or any(p.numel() == width > 1 for p in f.parameters()):
            return True
    return False


def _narrow_activation(model: nn.Module, site: Site, name: str, kept: Tensor) -> None:
    """Slice an activation with one parameter for each channel."""
    f = model.get_submodule(name)
    if isinstance(f, PartialActivation):
        raise PlanError(
            f"{site.name}: its activation is partly linear already; plan all its channels linear or dropped"
        )
    own = f.slope if isinstance(f, SlopeActivation) else f.weight if isinstance(f, nn.PReLU) else None
    if own is None:
        raise PlanError(f"{site.name}: it is not known how the channels of a {type(f).__name__} are counted")
    narrower = perform(model, {"edit": "activation", "name": name, "channels": len(kept)})
    with torch.no_grad():
        cast("Tensor", narrower.slope if isinstance(narrower, SlopeActivation) else narrower.weight).copy_(own[kept])


def _partial(model: nn.Module, name: str, kept: int, linear: int, gate: str, channels_first: bool) -> None:
    arguments = {"kept": kept, "linear": linear, "gate": gate, "channels_first": channels_first}
    perform(model, {"edit": "partial", "name": name, **arguments})


def _vanish(model: nn.Module, place: Place | None) -> str:
    """Make what stands at `place` an identity; the dotted name of it."""
    if place is None:
        raise PlanError("a site without an activation cannot become linear")
    name = _module_at(model, place)
    perform(model, {"edit": "identity", "name": name})
    return name


def _module_at(model: nn.Module, place: Place) -> str:
    if not place.calls:
        return place.module
    perform(model, {"edit": "externalise", "module": place.module, "calls": [list(call) for call in place.calls]})
    return externalise(model, place)


def _become(model: nn.Module, m: LinearMap) -> nn.Module:
    """The layer at `m.name`, exchanged for one of the sizes of `m` if it has others."""
    module = model.get_submodule(m.name)
    if is_the_map(module, m):
        return module
    return resize(model, m)


def _set(
    layer: nn.Module, *, columns: Sequence[Tensor] = (), rows: Sequence[Tensor] = (), bias: Sequence[Tensor] = ()
) -> None:
    """Set the weight of a layer, given side by side or one above the other, and its bias (zeros if none is given)."""
    own_weights(layer)
    weight, own = weight_of(layer), bias_of(layer)
    weight.copy_(_joined(columns, weight, 1) if columns else _joined(rows, weight, 0))
    if own is not None:
        own.copy_(_joined(bias, own, 0)) if bias else own.zero_()


def _joined(parts: Sequence[Tensor], like: Tensor, dim: int) -> Tensor:
    # the type first: a device without float64 cannot take the wide ones
    return torch.cat([part.to(like.dtype).to(like.device) for part in parts], dim)


def _consumers(model: nn.Module, site: Site) -> list[nn.Module]:
    return [model.get_submodule(m.name) for m in site.consumers]


def _unrolled(site: Site, up: Tensor, down: Tensor, producer: nn.Module, m: LinearMap) -> Tensor:
    geometry = {name: getattr(producer, name) for name in ("stride", "dilation")}
    padding = zeros_around(site, cast("nn.Conv2d", producer))
    return unrolled(up, down, m.size, site.consumers[0].size, padding=padding, **geometry)


def _name(m: LinearMap | None) -> str:
    if m is None:
        raise PlanError("the site has no producer")
    return m.name
