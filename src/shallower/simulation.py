"""A plan tried out on the original layers: what surgery must equal.

Every channel is replaced by its fate and nothing is merged or sliced. On purpose this file shares no arithmetic with
surgery.py, which is proven against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.attachment import detached_copy
from shallower.errors import PlanError
from shallower.fitting import check_fits
from shallower.forms import steps
from shallower.plan import Entry, Fate, Fit, Plan
from shallower.rewriting import externalise
from shallower.sites import Site

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
    entries = [step.entry for step in steps(plan.entries)]
    for entry in entries:
        place = entry.site.activation
        if place is None:
            raise PlanError(f"{entry.site.name}: the site has no activation")
        name = externalise(copied, place) if place.calls else place.module
        f = copied.get_submodule(name)
        copied.set_submodule(name, fated(entry, f).train(f.training))
    sources = {step.entry.site.name: step for step in steps(plan.entries)}
    for entry in entries:
        site = entry.site
        if site.producer is None:
            continue
        read_by, selected = (
            _source(entry, sources) if entry.fit is not None and entry.fit.ups else (site.producer.name, None)
        )
        modules = {m.name: copied.get_submodule(m.name) for m in site.maps}
        hook(entry, copied.get_submodule(read_by), modules, selected)


def fated(entry: Entry, f: nn.Module) -> nn.Module:
    """The activation of a site with each channel's fate in the place of f."""
    return nn.Identity() if entry.site.producer is None else _Fates(entry, f)


def hook(entry: Entry, reader: nn.Module, modules: Mapping[str, nn.Module], selected: Tensor | None = None) -> None:
    """Make the consumers of a site do what the fates or the fit say, by hooks.

    Args:
        entry: the fates.
        reader: the module that reads the x of a fitted linear path.
        modules: the site's linear maps by name.
        selected: the channels of x that the path reads; None for all.
    """
    site, fit = entry.site, entry.fit
    if fit is None:
        if site.gated:
            affine = _Affine(entry)
            for m in site.consumers:
                modules[m.name].register_forward_pre_hook(affine, with_kwargs=True)
        return
    memory = _Memory(selected, site.channels_first)
    if fit.ups:
        reader.register_forward_pre_hook(memory, with_kwargs=True)
    for i, m in enumerate(site.consumers):
        producer = modules[site.producer.name] if site.producer is not None else reader
        modules[m.name].register_forward_hook(_Fitted(site, fit, i, entry.kept, memory, producer), with_kwargs=True)


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
                return producer.name, step.entry.kept
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
        self.scale = torch.where(entry.fates == Fate.LINEAR, entry.slopes, torch.ones_like(entry.slopes))
        self.shift = torch.where(entry.fates == Fate.KEEP, torch.zeros_like(entry.offsets), entry.offsets)
        self.channels_first = entry.site.channels_first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = _input(args, kwargs)
        z = z * _vector(self.scale, z, self.channels_first) + _vector(self.shift, z, self.channels_first)
        return (z,), {}


class _Memory:
    """The last input of a module."""

    def __init__(self, selected: Tensor | None, channels_first: bool) -> None:
        self.selected = selected
        self.channels_first = channels_first
        self.x: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        self.x = x if self.selected is None else _select(x, self.selected, self.channels_first)


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
            y = y + _apply(module, fit.consumers[i], _select(z, self.kept, self.site.channels_first))
        if fit.ups:
            x = self.memory.x
            if x is None:
                raise PlanError(f"{self.site.name}: the consumer runs before the producer")
            if fit.down is None:
                y = y + _apply_full(self.producer[0], module, fit.ups[i], x)
            else:
                y = y + _apply(module, fit.ups[i], _apply(self.producer[0], fit.down, x))
        return y + _vector(fit.biases[i], y, y.dim() == 4 and isinstance(module, nn.Conv2d))


def _apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """`weight` with the geometry of `module`."""
    weight = weight.to(x.device, x.dtype)
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    return F.linear(x, weight)


def _apply_full(producer: nn.Module, consumer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """One full map with the geometry of producer and consumer together."""
    weight = weight.to(x.device, x.dtype)
    if not isinstance(consumer, nn.Conv2d) or not isinstance(producer, nn.Conv2d):
        return F.linear(x, weight)
    stride = [a * b for a, b in zip(producer.stride, consumer.stride, strict=True)]
    inner, outer = cast("tuple[int, int]", producer.padding), cast("tuple[int, int]", consumer.padding)
    padding = [p + s * q for p, s, q in zip(inner, producer.stride, outer, strict=True)]
    dilation = []
    for k1, d1, k2, s, d2 in zip(
        producer.kernel_size, producer.dilation, consumer.kernel_size, producer.stride, consumer.dilation, strict=True
    ):
        dilation.append(s * d2 if k1 == 1 and k2 > 1 else d1 if k2 == 1 and k1 > 1 else 1)
    return F.conv2d(x, weight, None, stride, padding, dilation)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found
