"""A plan tried out on the original layers: what surgery must equal.

Every channel is replaced by its fate and nothing is merged or sliced. On purpose this file shares no arithmetic with
surgery.py, which is proven against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.calibrating.selection import columns_of
from shallower.errors import PlanError
from shallower.modules.attachment import detached_copy
from shallower.modules.rewriting import externalise
from shallower.planning.entries import Entry, Fate, Fit
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.sites.heads import columns, heads_of
from shallower.surgery.checking import check_fits

M = TypeVar("M", bound=nn.Module)


def simulate(model: M, plan: Plan) -> M:
    """A copy of the model with its original layers, in which every channel does what the plan says.

    Consumers and linear paths that the plan has fitted are used; nothing is merged or sliced, so it is no cheaper than
    the model. `apply` makes a smaller model that equals it.

    Raises:
        PlanError: the plan does not fit the model.
    """
    copied = detached_copy(model)
    check_fits(copied, plan)
    impose(copied, plan)
    return copied


def impose(copied: nn.Module, plan: Plan) -> None:
    """Make a model do what `simulate` says, in place; nothing is checked."""
    done = {step.entry.site.name: step for step in steps(plan.entries)}
    entries = [step.entry for step in done.values()]
    for entry in entries:
        place = entry.site.activation
        if entry.site.kind == "heads":
            impose_heads(copied, entry)
            continue
        if place is None:
            raise PlanError(f"{entry.site.name}: the site has no activation")
        name = externalise(copied, place) if place.calls else place.module
        f = copied.get_submodule(name)
        copied.set_submodule(name, fated(entry, f).train(f.training))
        if entry.fold_skip and entry.site.residual is not None:
            externalise(copied, entry.site.residual.place)
    for entry in entries:
        site, fit = entry.site, entry.fit
        if site.producer is None:
            continue
        read_by, selected = site.producer.name, None
        if fit is not None and (fit.ups or fit.producer is not None or fit.gate is not None):
            read_by, selected = _source(entry, done)
        names = [m.name for m in site.maps] + ([site.norm_before] if site.norm_before else [])
        modules = {name: copied.get_submodule(name) for name in names}
        hook(entry, copied.get_submodule(read_by), modules, selected)


def fated(entry: Entry, f: nn.Module) -> nn.Module:
    """The activation of a site with each channel's fate in the place of f.

    In front of depthwise convolutions all channels stay: their fates are those of what comes behind.
    """
    if entry.site.producer is None:
        return nn.Identity()
    return f if entry.site.between else _Fates(entry, f)


def hook(entry: Entry, reader: nn.Module, modules: Mapping[str, nn.Module], selected: Tensor | None = None) -> None:
    """Make the maps of a site do what the fates or the fit say, by hooks.

    Args:
        entry: the fates.
        reader: the module that reads the x of a fitted linear path.
        modules: the site's linear maps and its first BatchNorm by name.
        selected: the channels of x that the path and a fitted producer read; None for all.
    """
    site, fit = entry.site, entry.fit
    if site.gated or site.between:
        affine = _Affine(entry)
        for m in site.consumers:
            if fit is None:
                modules[m.name].register_forward_pre_hook(affine, with_kwargs=True)
    if fit is None or site.producer is None:
        return
    producer = modules[site.producer.name]
    memory = _Memory(selected, site.channels_first)
    if fit.ups or fit.producer is not None or fit.gate is not None:
        reader.register_forward_pre_hook(memory, with_kwargs=True)
        if site.gate is not None and reader is producer:  # the gate reads the same, and may run first
            modules[site.gate.name].register_forward_pre_hook(memory, with_kwargs=True)
    up, gate = _rows(site, entry.kept)
    for module, channels, weight, bias in (
        (producer, up, fit.producer, fit.producer_bias),
        (modules[site.gate.name] if site.gate is not None else producer, gate, fit.gate, fit.gate_bias),
    ):
        if module is producer and bias is not None and site.norm_before:
            _set_shift(site, modules[site.norm_before], channels, bias)
            bias = None
        if weight is not None:
            rows = _FittedRows(site, channels, weight, bias, memory)
            module.register_forward_hook(rows, with_kwargs=True)
    for i, m in enumerate(site.consumers):
        modules[m.name].register_forward_hook(_Fitted(site, fit, i, entry.kept, memory, producer), with_kwargs=True)


def _set_shift(site: Site, norm: nn.Module, channels: Tensor, shift: Tensor) -> None:
    if not isinstance(norm.bias, Tensor):
        raise PlanError(f"{site.name}: `{site.norm_before}` has no shift that could be fitted")
    with torch.no_grad():
        norm.bias[channels.to(norm.bias.device)] = shift.to(norm.bias)


def _rows(site: Site, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs of their layers are the kept channels of the up projection, and of the gate."""
    return (
        kept + site.width if site.packed == "gate-first" else kept,
        kept + site.width if site.packed == "up-first" else kept,
    )


def _source(entry: Entry, plan: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """Which module reads what the site reads after the earlier entries of the plan, and which channels are left."""
    producer = entry.site.producer
    if producer is None:
        raise PlanError(f"{entry.site.name}: an activation place has no maps to fit")
    for step in plan.values():
        if producer.name in [m.name for m in step.entry.site.consumers]:
            if step.form.kind == "merged":
                return _source(step.entry, plan)
            if step.form.kind == "narrower":
                return producer.name, columns_of(step.entry.kept, step.entry.site.block)
            raise PlanError(
                f"{entry.site.name}: its linear path reads what `{step.entry.site.name}` becomes, a linear path "
                "itself. Apply that entry first, and fit this site on the result"
            )
    return producer.name, None


def _vector(values: Tensor, like: Tensor, channels_first: bool) -> Tensor:
    """(n,) aligned with the channels of `like`."""
    values = values.to(like.device, like.dtype)
    return values.reshape(-1, *[1] * (like.dim() - 2)) if channels_first else values


def _select(x: Tensor, channels: Tensor, channels_first: bool) -> Tensor:
    return x.index_select(1 if channels_first else -1, channels.to(x.device))


class _Fates(nn.Module):
    """f, an affine map or a constant, channel by channel."""

    def __init__(self, entry: Entry, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.entry = entry

    def forward(self, h: Tensor) -> Tensor:
        entry = self.entry
        first = entry.site.channels_first

        def vector(values: Tensor) -> Tensor:
            return _vector(values, h, first)

        kept = self.f(h.clone())
        if entry.alphas is not None:
            a = vector(entry.alphas) if entry.alphas.numel() > 1 else entry.alphas.to(h.device, h.dtype)
            if entry.family == "prelu":
                kept = torch.clamp(h, min=0) + a * torch.clamp(h, max=0)
            else:
                kept = (a if entry.site.gated else a * h) + (1 - a) * kept
        is_kept = vector(entry.fates == Fate.KEEP).bool()
        is_linear = vector(entry.fates == Fate.LINEAR).bool()
        if entry.site.gated:
            return torch.where(is_kept, kept, is_linear.to(h.dtype))
        line = vector(entry.slopes) * h + vector(entry.offsets)
        return torch.where(is_kept, kept, torch.where(is_linear, line, vector(entry.offsets).expand_as(h)))


class _Affine:
    """Slopes and offsets of a gated site, before a consumer."""

    def __init__(self, entry: Entry) -> None:
        self.scale = torch.where(entry.fates == Fate.LINEAR, entry.slopes, (entry.fates == Fate.KEEP).double())
        self.shift = torch.where(entry.fates == Fate.KEEP, torch.zeros_like(entry.offsets), entry.offsets)
        self.channels_first = entry.site.channels_first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = _input(args, kwargs)
        z = z * _vector(self.scale, z, self.channels_first) + _vector(self.shift, z, self.channels_first)
        return (z,), {}


class _FittedRows:
    """Some outputs of a producer from fitted rows."""

    def __init__(self, site: Site, channels: Tensor, weight: Tensor, bias: Tensor | None, memory: _Memory) -> None:
        self.channels, self.weight, self.bias, self.memory = channels, weight, bias, memory
        self.site, self.channels_first = site, site.channels_first

    def __call__(self, module: nn.Module, _: Any, __: Any, output: Tensor) -> Tensor:
        x = self.memory.read(self.site)
        rows = _apply(module, self.weight, x)
        bias = self.bias
        if bias is None and isinstance(module.bias, Tensor):
            bias = module.bias.detach()[self.channels.to(output.device)]
        if bias is not None:
            rows = rows + _vector(bias, rows, self.channels_first)
        output = output.clone()
        output.index_copy_(1 if self.channels_first else -1, self.channels.to(output.device), rows)
        return output


class _Memory:
    """The last input of a module."""

    def __init__(self, selected: Tensor | None, channels_first: bool) -> None:
        self.selected = selected
        self.channels_first = channels_first
        self.x: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        self.x = x if self.selected is None else _select(x, self.selected, self.channels_first)

    def read(self, site: Site) -> Tensor:
        """What was remembered."""
        if self.x is None:
            raise PlanError(f"{site.name}: the consumer runs before the producer")
        return self.x


class _Fitted:
    """A consumer with fitted maps in the place of its own."""

    def __init__(self, site: Site, fit: Fit, i: int, kept: Tensor, memory: _Memory, producer: nn.Module) -> None:
        self.site, self.fit, self.i, self.kept, self.memory = site, fit, i, kept, memory
        # in a list: a hook is copied with its module, and this must not make the producer a child of anything
        self.producer = [producer]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        z, fit, i = _input(args, kwargs), self.fit, self.i
        y = torch.zeros_like(output)
        if len(self.kept):
            columns = columns_of(self.kept, self.site.block)
            y = y + _apply(module, fit.consumers[i], _select(z, columns, self.site.channels_first))
        if fit.ups:
            x = self.memory.read(self.site)
            if fit.down is None:
                y = y + _apply_full(self.producer[0], module, fit.ups[i], x)
            else:
                middle = _apply(self.producer[0], fit.down, x)
                if fit.down_bias is not None:
                    middle = middle + _vector(fit.down_bias, middle, self.site.channels_first)
                y = y + _apply(module, fit.ups[i], middle)
        return y + _vector(fit.biases[i], y, y.dim() == 4 and isinstance(module, nn.Conv2d))


def _apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """`weight` with the geometry of `module`."""
    weight = weight.to(x.device, x.dtype)
    if not isinstance(module, nn.Conv2d):
        return F.linear(x, weight)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    return F.conv2d(x, weight, None, module.stride, padding, module.dilation)


def _apply_full(producer: nn.Module, consumer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """One full map with the geometry of producer and consumer together, whatever the size of its kernel."""
    weight = weight.to(x.device, x.dtype)
    if not isinstance(consumer, nn.Conv2d) or not isinstance(producer, nn.Conv2d):
        return F.linear(x, weight)
    stride, padding, dilation = [], [], []
    for i in (0, 1):
        k1, d1, s1 = producer.kernel_size[i], producer.dilation[i], producer.stride[i]
        k2, d2 = consumer.kernel_size[i], consumer.dilation[i]
        inner, outer = d1 * (k1 - 1), s1 * d2 * (k2 - 1)
        whole = inner + outer
        # the size of the exact composition, spread as that is where one of the two has a single tap
        spread = s1 * d2 if inner == 0 and outer else d1 if outer == 0 and inner else 1
        step = spread if weight.shape[2 + i] == whole // spread + 1 else 1
        missing = whole - step * (weight.shape[2 + i] - 1)
        stride.append(s1 * consumer.stride[i])
        padding.append(_zeros(producer, i) + s1 * _zeros(consumer, i) - missing // 2)
        dilation.append(step)
    return F.conv2d(x, weight, None, stride, padding, dilation)


def _zeros(module: nn.Conv2d, i: int) -> int:
    """Zeros on each side of an axis."""
    if module.padding == "same":
        return module.dilation[i] * (module.kernel_size[i] - 1) // 2
    return 0 if isinstance(module.padding, str) else module.padding[i]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def impose_heads(model: nn.Module, entry: Entry) -> None:
    """Make a model with all its heads do what `narrow` makes of it, by hooks: dropped heads give zeros."""
    heads, consumer = heads_of(entry.site), model.get_submodule(entry.site.consumers[0].name)
    chosen = columns(heads, entry.kept)

    def zero_the_dropped(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        stays = torch.zeros(z.shape[-1], dtype=torch.bool, device=z.device)
        stays[chosen.to(z.device)] = True
        return (torch.where(stays, z, torch.zeros_like(z)),), {}

    def fitted(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        z: Tensor = args[0] if args else next(iter(kwargs.values()))
        fit = entry.fit
        assert fit is not None
        weight, bias = fit.consumers[0].to(z.device, z.dtype), fit.biases[0].to(z.device, z.dtype)
        return F.linear(z[..., chosen.to(z.device)], weight, bias).to(output.dtype)

    if entry.fit is None:
        consumer.register_forward_pre_hook(zero_the_dropped, with_kwargs=True)
    else:
        consumer.register_forward_hook(fitted, with_kwargs=True)
