"""A plan as edits of a model.

    for edit in edits_of(plan, model):
        perform(model, edit)

Nothing here changes a module. Which edits a step takes depends on the weights that the earlier steps of its plan left,
so `edits_of_step` reads the model as it is then, and its edits are performed before the next step is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.core.algebra import grouped, scale_rows, unrolled, with_skip
from shallower.errors import PlanError
from shallower.modules.activations import PartialActivation, SlopeActivation
from shallower.modules.attachment import detached_copy
from shallower.modules.edits import (
    Activation,
    Doubled,
    Edit,
    Externalise,
    Identity,
    Norm,
    Partial,
    Resize,
    Slope,
    Summand,
    Weights,
    perform,
)
from shallower.modules.layers import bias_of, is_the_map, weight_of
from shallower.modules.rewriting import name_at
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.forms import Form, Step, steps
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Place, Residual, Site
from shallower.surgery.branches.removing import edits_of_branch
from shallower.surgery.cutting import edits_of_cut
from shallower.surgery.padding import zeros_around
from shallower.surgery.paths import Path, affine, as_read, columns_read, linear_path_of, product_of


def edits_of(plan: Plan, model: nn.Module) -> list[Edit]:
    """All edits of a plan, in order; those of overlapping sites hold the weights that earlier ones leave.

        for edit in edits_of(plan, model):
            perform(model, edit)

    Args:
        plan: for this model.
        model: not changed.

    Raises:
        PlanError: the plan does not fit the model.
    """
    trial, made = detached_copy(model), []
    for step in steps(plan.entries):
        edits = edits_of_step(step, trial)
        for edit in edits:
            perform(trial, edit)
        made += edits
    return made


def operate(model: nn.Module, step: Step) -> None:
    """Give one site of the model, in place, the form that `step` says."""
    for edit in edits_of_step(step, model):
        perform(model, edit)


@torch.no_grad()
def edits_of_step(step: Step, model: nn.Module) -> list[Edit]:
    """The edits that give one site the form that `step` says.

    Args:
        step: of a plan.
        model: as the earlier steps left it; it is not changed.

    Raises:
        PlanError: the step does not fit the model.
    """
    edits = _edits_of_site(step, model)
    if step.last_call:
        edits += _other_names(model, _required(step.entry.site.activation))
    return edits


def _edits_of_site(step: Step, model: nn.Module) -> list[Edit]:
    entry, form = step.entry, step.form
    site = entry.site
    if site.followed:
        return edits_of_cut(model, entry, form)
    if site.branch is not None:
        return edits_of_branch(model, entry)
    if site.producer is None or form.kind == "removed":
        return _gone(model, _required(site.activation))
    if form.kind == "apart" and any(m.groups > 1 for m in form.maps):
        return _grouped_apart(model, entry, form)
    producer = model.get_submodule(site.producer.name)
    path = linear_path_of(model, entry, form, producer, _readers(model, site))
    if form.kind == "merged":
        return _as_one_map(model, entry, form, path)
    if form.kind in ("pair", "apart"):
        return _as_two_maps(model, site, form, path)
    return _with_kept_channels(model, entry, form, path)


# ------------------------------------------------------------------------------------------ sites without kept channels


def _as_one_map(model: nn.Module, entry: Entry, form: Form, path: Path) -> list[Edit]:
    """One map C diag(s) P in the place of each consumer."""
    site = entry.site
    made = cast("LinearMap", site.producer)
    producer = model.get_submodule(made.name)
    weights = []
    for up, consumer, m in zip(path.ups, _readers(model, site), form.consumers, strict=True):
        if site.bridge.has("flatten"):
            weights.append(_over_pixels(site, up, cast("Tensor", path.down), cast("nn.Conv2d", producer), m))
        else:
            weights.append(product_of(up, path.down, producer, consumer))
    edits: list[Edit] = []
    biases = path.biases
    if entry.fold_skip:
        edits = _without_sum(model, cast("Residual", site.residual), weights, biases)
    for m, weight, bias in zip(form.consumers, weights, biases, strict=True):
        edits += _as_layer(model, m, grouped(weight, m.groups), bias)
    if site.bridge.packed:
        edits.append(Doubled(made.name, site.bridge.image))
    else:
        edits.append(Identity(made.name))
    return edits + _nothing_between(model, site, form.consumers[0].d_in)


def _over_pixels(site: Site, up: Tensor, down: Tensor, producer: nn.Conv2d, m: LinearMap) -> Tensor:
    """A convolution, and a linear layer over all pixels of what it gives, as one linear layer."""
    return unrolled(
        up,
        down,
        m.size,
        site.consumers[0].size,
        padding=zeros_around(site, producer),
        stride=cast("tuple[int, int]", producer.stride),
        dilation=cast("tuple[int, int]", producer.dilation),
    )


def _without_sum(
    model: nn.Module, residual: Residual, weights: list[Tensor], biases: list[Tensor]
) -> list[Edit]:  # fmt: skip
    """Let the one merged map do what the sum behind it does, norm(W x + b) + x, and take the sum away."""
    edits: list[Edit] = []
    norm = affine(model, residual.norm)
    if norm is not None:
        scale, shift = norm
        weights[0], biases[0] = scale_rows(weights[0], scale), biases[0] * scale + shift
        edits.append(Identity(residual.norm))
    weights[0] = with_skip(weights[0])
    made, name = _at(model, residual.place)
    return [*edits, *made, Summand(name, residual.branch)]


def _as_two_maps(model: nn.Module, site: Site, form: Form, path: Path) -> list[Edit]:
    """Producer and consumers with nothing between them: y = up (down x + shift) + bias."""
    down, shift, ups = cast("Tensor", path.down), path.shift, path.ups
    if len(down) == 0:  # nothing is left but a constant: a layer needs at least one channel
        down, shift = down.new_zeros(1, *down.shape[1:]), None
        ups = [up.new_zeros(up.shape[0], site.bridge.block, *up.shape[2:]) for up in ups]
    if site.bridge.packed:
        down = _halves(site, torch.zeros_like(down), down)
    if site.bridge.packed and shift is not None:
        shift = _halves(site, torch.zeros_like(shift), shift)
    edits = _as_layer(model, cast("LinearMap", form.producer), down, shift)
    for m, up, bias in zip(form.consumers, ups, path.biases, strict=True):
        edits += _as_layer(model, m, up, bias)
    return edits + _nothing_between(model, site, form.width)


def _grouped_apart(model: nn.Module, entry: Entry, form: Form) -> list[Edit]:
    """Grouped convolutions with nothing between them: every channel stays, and the producer does all that was there."""
    site, made = entry.site, cast("LinearMap", form.producer)
    everything = torch.arange(site.width)
    slopes = torch.where(entry.fates == Fate.LINEAR, entry.slopes, 0.0)
    producer = model.get_submodule(made.name)
    rows, shift, _ = as_read(model, replace(entry, slopes=slopes), producer, everything, everything[:0])
    return _as_layer(model, made, grouped(rows, made.groups), shift) + _nothing_between(model, site, site.width)


def _nothing_between(model: nn.Module, site: Site, width: int) -> list[Edit]:
    """Identities for all that stood between the two linear maps; a gate becomes ones of that width."""
    edits: list[Edit] = []
    if site.gate is not None:
        edits.append(Identity(site.gate.name))
    place = _required(site.activation)
    edits += _gone(model, place)
    if site.bridge.gated:
        edits.append(Partial(name_at(model, place), 0, width, _gate(site), site.bridge.image))
    edits += [Identity(norm) for norm in (site.bridge.norm_before, site.bridge.norm_after) if norm]
    for dropout in site.dropouts:
        edits += _gone(model, dropout)
    return edits


# --------------------------------------------------------------------------------------------- sites with kept channels


def _with_kept_channels(model: nn.Module, entry: Entry, form: Form, path: Path) -> list[Edit]:
    """The same layers with the kept channels, and a linear path beside them where the form has one."""
    site, kept, fit = entry.site, entry.kept, entry.fit
    if form.kept == site.width and form.rank == 0 and fit is None:
        return _activation_edits(model, entry, form)
    producer = model.get_submodule(cast("LinearMap", site.producer).name)
    consumers = _readers(model, site)
    down, ups = _reduced(path, form, producer, consumers)
    rows, bias = _kept_rows(producer, site.bridge.up_rows(kept), fit, "producer", bool(site.bridge.norm_before))
    shift = down.new_zeros(form.rank)
    if path.shift is not None and form.rank:
        shift = path.shift
    if form.rank:
        rows, bias = _side_by_side(rows, down), _side_by_side(bias, shift)
    if site.bridge.packed:
        gates, gate_bias = _kept_rows(producer, site.bridge.gate_rows(kept), fit, "gate")
        if form.rank:
            gates, gate_bias = (
                _side_by_side(gates, torch.zeros_like(down)),
                _side_by_side(gate_bias, torch.zeros_like(shift)),
            )
        rows, bias = _halves(site, gates, rows), _halves(site, gate_bias, bias)
    edits = _as_layer(model, cast("LinearMap", form.producer), rows, bias)
    if site.gate is not None:
        gates, gate_bias = _kept_rows(model.get_submodule(site.gate.name), kept, fit, "gate")
        edits += _as_layer(model, cast("LinearMap", form.gate), gates, gate_bias)
    for m in form.between:
        filters, own_bias = _kept_rows(model.get_submodule(m.name), kept)
        edits += _as_layer(model, m, filters, own_bias)
    for i, (m, consumer) in enumerate(zip(form.consumers, consumers, strict=True)):
        columns = columns_read(site, consumer, kept) if fit is None else fit.consumers[i]
        if form.rank:
            columns = _side_by_side(columns, ups[i], 1)
        edits += _as_layer(model, m, columns, path.biases[i])
    edits += _norms(model, entry, form)
    edits += _activation_edits(model, entry, form)
    for place in site.bridge.activations[1:]:
        if form.kept < site.width and _has_channels(model, place, site.width):
            made, name = _at(model, place)
            edits += made + _fewer_parameters(model, site, place, name, kept)
    return edits


def _norms(model: nn.Module, entry: Entry, form: Form) -> list[Edit]:
    """The BatchNorms of a site with the vectors of its kept channels; those of a linear path pass unchanged."""
    site, kept, fit = entry.site, entry.kept, entry.fit
    edits: list[Edit] = []
    for name in site.bridge.norms:
        norm = cast("_BatchNorm", model.get_submodule(name))
        channels = form.kept + form.rank
        numbers = _norm_vectors(norm, kept, channels)
        if name == site.bridge.norm_before and fit is not None and fit.producer_bias is not None:
            if "bias" not in numbers:
                raise PlanError(f"{site.name}: `{name}` has no shift that could be fitted")
            numbers["bias"][: len(kept)] = fit.producer_bias.to(numbers["bias"])
        edits += [Norm(name, channels), Weights(name, numbers)]
    return edits


def _norm_vectors(norm: _BatchNorm, kept: Tensor, channels: int) -> dict[str, Tensor]:
    """The vectors of a BatchNorm at `kept`, followed by channels that pass unchanged: mean 0 and variance 1 - eps."""
    numbers = {}
    neutral = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - norm.eps}
    for name, value in neutral.items():
        own = getattr(norm, name)
        if own is not None:
            numbers[name] = own.new_full((channels,), value)
            numbers[name][: len(kept)] = own[kept.to(own.device)]
    return numbers


def _kept_rows(
    layer: nn.Module, rows: Tensor, fit: Fit | None = None, role: str = "", shifted: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of these rows of a layer, or what was fitted in their place; zeros where it has no bias.

    Where a BatchNorm behind the layer shifts the channels (`shifted`), the fitted bias is its, not the layer's.
    """
    weight, bias = weight_of(layer), bias_of(layer)
    rows = rows.to(weight.device)
    own, shift = weight[rows], weight.new_zeros(len(rows))
    if bias is not None:
        shift = bias[rows]
    if fit is None:
        return own, shift
    own = fit.singles.get(role, own)
    if shifted:
        return own, shift
    return own, fit.singles.get(f"{role}_bias", shift)


def _reduced(
    path: Path, form: Form, producer: nn.Module, consumers: Sequence[nn.Module]
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The same path with fewer channels, where there are fewer inputs or outputs than channels.

    Through the inputs, down is the identity and the ups are the whole products; through the outputs it is the reverse.
    """
    down, ups = path.down, path.ups
    if form.through == "channels" and down is not None:
        return down, ups
    products = [product_of(up, down, producer, consumer) for up, consumer in zip(ups, consumers, strict=True)]
    if form.through == "inputs":
        return _identity_map(form.rank, ups[0].device, isinstance(producer, nn.Conv2d)), products
    full = torch.cat(products)
    eye = _identity_map(len(full), full.device, isinstance(consumers[0], nn.Conv2d))
    return full, list(torch.split(eye, [up.shape[0] for up in ups]))


def _identity_map(channels: int, device: torch.device, convolution: bool) -> Tensor:
    eye = torch.eye(channels, dtype=torch.float64, device=device)
    if convolution:
        return eye[:, :, None, None]
    return eye


# ------------------------------------------------------------------------------------------------------ activations


def _activation_edits(model: nn.Module, entry: Entry, form: Form) -> list[Edit]:
    """What becomes of the activation: its parameters sliced, a slope, a linear path beside it."""
    site, kept, place = entry.site, entry.kept, entry.site.activation
    if place is None:
        return []
    # a PReLU slope takes the place of f, whose own parameters nobody would use any more
    replaced = entry.alphas is not None and entry.family == "prelu"
    narrower = not replaced and form.kept < site.width and _has_channels(model, place, site.width)
    if entry.alphas is None and form.rank == 0 and not narrower:
        return []
    edits, name = _at(model, place)
    if narrower:
        edits += _fewer_parameters(model, site, place, name, kept)
    if replaced:
        edits.append(Identity(name))
    if entry.alphas is not None:
        edits += _slope(model, entry, name)
    if form.rank:
        edits.append(Partial(name, form.kept, form.rank, _gate(site), site.bridge.image))
    return edits


def _slope(model: nn.Module, entry: Entry, name: str) -> list[Edit]:
    """A slope activation around f, one slope for all channels or one for each."""
    site, alphas = entry.site, cast("Tensor", entry.alphas)
    width = 0
    if alphas.numel() > 1:
        alphas = alphas[entry.kept]
        width = len(alphas)
    weight = weight_of(model.get_submodule(cast("LinearMap", site.producer).name))
    dtype: Literal["float32", "float64"] = "float32"
    if weight.dtype == torch.float64:
        dtype = "float64"
    target: Literal["identity", "one"] = "identity"
    if site.bridge.gated:
        target = "one"
    made = Slope(name, width, entry.family, target, site.bridge.image, dtype)
    return [made, Weights(name, {"slope": alphas})]


def _fewer_parameters(model: nn.Module, site: Site, place: Place, name: str, kept: Tensor) -> list[Edit]:
    """An activation with one parameter for each channel, sliced."""
    f = _standing(model, place)
    if isinstance(f, PartialActivation):
        raise PlanError(
            f"{site.name}: its activation is partly linear already; plan all its channels linear or dropped"
        )
    if isinstance(f, SlopeActivation):
        own, parameter = f.slope, "slope"
    elif isinstance(f, nn.PReLU):
        own, parameter = f.weight, "weight"
    else:
        raise PlanError(f"{site.name}: it is not known how the channels of a {type(f).__name__} are counted")
    numbers = own.detach()[kept.to(own.device)]
    return [Activation(name, len(kept)), Weights(name, {parameter: numbers})]


def _has_channels(model: nn.Module, place: Place, width: int) -> bool:
    """Whether what stands at a place has parameters for each channel, or is a form of activation that counts them."""
    for name in place.modules:
        f = model.get_submodule(name)
        if isinstance(f, PartialActivation) or any(p.numel() == width > 1 for p in f.parameters()):
            return True
    return False


def _standing(model: nn.Module, place: Place) -> nn.Module:
    """The module at a place, also where it is one of several calls yet."""
    try:
        return model.get_submodule(name_at(model, place))
    except AttributeError:
        called = place.modules
        if len(called) == 1 == len(place.calls):
            return model.get_submodule(called[0])
        return nn.Module()


# ------------------------------------------------------------------------------------------------------------ pieces


def _gate(site: Site) -> Literal["", "separate", "packed"]:
    """How a partial activation of this site is told of its gate."""
    if site.bridge.packed:
        return "packed"
    if site.bridge.gated:
        return "separate"
    return ""


def _at(model: nn.Module, place: Place) -> tuple[list[Edit], str]:
    """The edits that make what stands at a place a module, and its name then."""
    if not place.calls:
        return [], place.module
    return [Externalise(place.module, place.calls)], name_at(model, place)


def _gone(model: nn.Module, place: Place) -> list[Edit]:
    """The edits that make what stands at a place an identity."""
    edits, name = _at(model, place)
    return [*edits, Identity(name)]


def _other_names(model: nn.Module, place: Place) -> list[Edit]:
    """Identities for a module that is called at a place and nowhere else any more, under all of its other names."""
    edits: list[Edit] = []
    here, _, own = name_at(model, place).rpartition(".")
    called = list(map(model.get_submodule, place.modules))
    for prefix, owner in model.named_modules():
        for child, module in owner._modules.items():
            itself = owner is model.get_submodule(here) and child == own
            if module in called and not itself:
                edits.append(Identity(f"{prefix}.{child}".strip(".")))
    return edits


def _required(place: Place | None) -> Place:
    if place is None:
        raise PlanError("a site without an activation cannot become linear")
    return place


def _as_layer(model: nn.Module, m: LinearMap, weight: Tensor, bias: Tensor | None) -> list[Edit]:
    """The layer at `m.name` with the sizes of `m` and these numbers; zeros for a bias that is not given."""
    edits: list[Edit] = []
    if not is_the_map(model.get_submodule(m.name), m):
        edits.append(Resize.to(m))
    numbers = {"weight": weight}
    if m.bias:
        if bias is None:
            bias = weight.new_zeros(m.d_out)
        numbers["bias"] = bias
    return [*edits, Weights(m.name, numbers)]


def _halves(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up projection in the order in which a packed producer gives them."""
    if site.bridge.gate_first:
        return _side_by_side(gate, up)
    return _side_by_side(up, gate)


def _side_by_side(first: Tensor, second: Tensor, dim: int = 0) -> Tensor:
    """Two parts of a weight; on the CPU where one of them is there, for it may be too wide for another device."""
    device = first.device
    if second.device.type == "cpu":
        device = second.device
    return torch.cat([first.to(device), second.to(device)], dim)


def _readers(model: nn.Module, site: Site) -> list[nn.Module]:
    return [model.get_submodule(m.name) for m in site.consumers]
