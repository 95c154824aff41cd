"""A plan tried out on the original layers: what surgery must equal.

Every channel is replaced by its fate and nothing is merged or sliced. On purpose this file shares no arithmetic with
what does surgery, which is proven against it: channels are told apart by the shape of a tensor (its halves, its
blocks), never by numbers of rows and columns.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.modes import without_inference_mode
from shallower.core.watching import read
from shallower.errors import PlanError
from shallower.modules.attachment import detached_copy
from shallower.modules.rewriting import externalise
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Site, by_name
from shallower.surgery.checking import check_fits
from shallower.surgery.imposing.branches import impose_branches
from shallower.surgery.imposing.calls import limit_calls
from shallower.surgery.imposing.zeros import gone_along, impose_cuts

M = TypeVar("M", bound=nn.Module)


@without_inference_mode()
def simulate(model: M, plan: Plan) -> M:
    """A copy of the model with its original layers, in which every channel does what the plan says.

        y = sh.simulate(model, plan)(x)         # what sh.apply(model, plan, x)(x) must equal

    Consumers and linear paths that the plan has fitted are used; nothing is merged or sliced, so it is no cheaper than
    the model. `apply` makes a smaller model that equals it.

    Raises:
        PlanError: the plan does not fit the model.
    """
    copied = detached_copy(model)
    check_fits(copied, plan)
    impose(copied, steps(plan.entries))
    return copied


def impose(copied: nn.Module, todo: Iterable[Step]) -> None:
    """Make a model do what `simulate` says, in place; nothing is checked."""
    done = {step.entry.site.name: step for step in todo}
    entries = [step.entry for step in done.values()]
    for entry in entries:
        place = entry.site.activation
        if entry.site.followed or entry.site.branch is not None:
            continue
        if place is None:
            raise PlanError(f"{entry.site.name}: the site has no activation")
        name = externalise(copied, place) if place.calls else place.module
        f = copied.get_submodule(name)
        copied.set_submodule(name, fated(entry, f).train(f.training))
        if entry.fold_skip and entry.site.residual is not None:
            externalise(copied, entry.site.residual.place)
    followed = [entry for entry in entries if entry.site.followed]
    impose_cuts(copied, followed)
    limit_calls(copied, followed)
    impose_branches(copied, entries)
    for entry in entries:
        site, fit = entry.site, entry.fit
        if site.followed and fit is not None:
            _hook_fitted(copied, entry, fit)
        if site.producer is None:
            continue
        origin = _Origin(site.producer.name)
        if fit is not None and (fit.ups or fit.producer is not None or fit.gate is not None):
            origin = _origin(entry, done)
        names = (*by_name(site.maps), *filter(None, [site.bridge.norm_before]))
        modules = {name: copied.get_submodule(name) for name in names}
        _hook(entry, copied.get_submodule(origin.reader), modules, origin)
    fitted = {m.name for entry in entries if entry.fit is not None for m in entry.site.consumers}
    for entry in followed:
        _silence_rows(copied, entry, fitted)


def fated(entry: Entry, f: nn.Module) -> nn.Module:
    """The activation of a site with each channel's fate in the place of f.

    In front of depthwise convolutions all channels stay: their fates are those of what comes behind.
    """
    if entry.site.producer is None:
        return nn.Identity()
    if entry.site.bridge.has("depthwise"):
        return f
    return _Fates(entry, f)


def _hook(entry: Entry, reader: nn.Module, modules: Mapping[str, nn.Module], origin: _Origin) -> None:
    """Make the maps of a site do what the fates or the fit say, by hooks.

    Args:
        entry: the fates.
        reader: the module that reads the x of a fitted linear path.
        modules: the site's linear maps and its first BatchNorm by name.
        origin: what earlier entries make of that x.
    """
    site, fit = entry.site, entry.fit
    if site.bridge.gated or site.bridge.has("depthwise"):
        affine = _Affine(entry)
        for m in site.consumers:
            if fit is None:
                modules[m.name].register_forward_pre_hook(affine, with_kwargs=True)
    if fit is None or site.producer is None:
        return
    producer = modules[site.producer.name]
    memory = _Memory(origin, site.bridge.dim)
    if fit.ups or fit.producer is not None or fit.gate is not None:
        reader.register_forward_pre_hook(memory, with_kwargs=True)
        if site.gate is not None and reader is producer:  # the gate reads the same, and may run first
            modules[site.gate.name].register_forward_pre_hook(memory, with_kwargs=True)
    shift = fit.producer_bias
    if shift is not None and site.bridge.norm_before:
        _set_shift(site, modules[site.bridge.norm_before], entry.kept, shift)
        shift = None
    up_half, gate_half = None, None
    if site.bridge.packed:
        up_half = int(site.bridge.gate_first)
        gate_half = 1 - up_half
    if fit.producer is not None:
        rows = _FittedRows(site, entry.kept, fit.producer, shift, memory, origin, up_half)
        producer.register_forward_hook(rows, with_kwargs=True)
    if fit.gate is not None:
        gate = producer if site.gate is None else modules[site.gate.name]
        rows = _FittedRows(site, entry.kept, fit.gate, fit.gate_bias, memory, origin, gate_half)
        gate.register_forward_hook(rows, with_kwargs=True)
    for i, m in enumerate(site.consumers):
        modules[m.name].register_forward_hook(
            _FittedConsumer(site, fit, i, entry.kept, memory, producer), with_kwargs=True
        )


def _hook_fitted(copied: nn.Module, entry: Entry, fit: Fit) -> None:
    """Make what reads the channels of a followed site compute with its fitted weights."""
    site = entry.site
    for i, m in enumerate(site.consumers):
        module = copied.get_submodule(m.name)
        nothing = _Memory(_Origin(m.name), site.bridge.dim)
        fitted = _FittedConsumer(site, fit, i, entry.kept, nothing, module)
        module.register_forward_hook(fitted, with_kwargs=True)


def _silence_rows(copied: nn.Module, entry: Entry, fitted: Container[str]) -> None:
    """Let what is fitted to write the dropped channels of a followed site write zeros."""
    for slot in entry.site.slots:
        if slot.side != "rows" or not slot.output or slot.module not in fitted:
            continue
        gone = gone_along(entry, slot.spans, slot.shape[slot.axis]).nonzero().flatten()

        def silent(_: nn.Module, _args: Any, output: Tensor, dim: int = slot.output, gone: Tensor = gone) -> Tensor:
            return output.index_fill(dim, gone.to(output.device), 0)

        copied.get_submodule(slot.module).register_forward_hook(silent)


def _set_shift(site: Site, norm: nn.Module, channels: Tensor, shift: Tensor) -> None:
    if not isinstance(norm.bias, Tensor):
        raise PlanError(f"{site.name}: `{site.bridge.norm_before}` has no shift that could be fitted")
    with torch.no_grad():
        norm.bias[channels.to(norm.bias.device)] = shift.to(norm.bias)


@dataclass(frozen=True)
class _Left:
    """Which channels of a tensor an earlier entry leaves: blocks of equal length, one for each of `width` channels."""

    width: int
    kept: Tensor

    def of(self, x: Tensor, dim: int) -> Tensor:
        """Their blocks, side by side."""
        blocks = torch.unflatten(x, dim, (self.width, -1))
        dim = dim % x.dim()
        return blocks.index_select(dim, self.kept.to(x.device)).flatten(dim, dim + 1)

    def without(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor with zeros in their place."""
        blocks = torch.unflatten(x, dim, (self.width, -1))
        dim = dim % x.dim()
        return blocks.index_fill(dim, self.kept.to(x.device), 0).flatten(dim, dim + 1)


@dataclass(frozen=True)
class _Origin:
    """What a producer reads, and adds as its bias, after the earlier entries of a plan.

    Attributes:
        reader: the module that reads the same in the simulated model.
        left: the channels of it that are left; None for all.
        bias: of the producer after an earlier fit; None where it follows from its own bias and what is left.
        pixels: where the reader reads an image and the producer its pixels, what lies between: "flatten" or "average".
    """

    reader: str
    left: _Left | None = None
    bias: Tensor | None = None
    pixels: Literal["", "flatten", "average"] = ""

    def of(self, x: Tensor, dim: int) -> Tensor:
        """What the producer reads, from what the reader reads."""
        read_dim = dim
        if self.pixels:
            read_dim = 1
        if self.left is not None:
            x = self.left.of(x, read_dim)
        if self.pixels == "flatten":
            x = x.flatten(1)
        elif self.pixels == "average":
            x = x.mean((2, 3), keepdim=dim == 1)
        return x


def _origin(entry: Entry, plan: Mapping[str, Step]) -> _Origin:
    site, fit = entry.site, entry.fit
    if site.producer is None:
        raise PlanError(f"{site.name}: an activation place has no maps to fit")
    for step in plan.values():
        names = list(by_name(step.entry.site.consumers))
        if site.producer.name not in names:
            continue
        i, earlier = names.index(site.producer.name), step.entry
        if step.form.kind == "narrower":
            bias = None if earlier.fit is None else earlier.fit.biases[i]
            return _Origin(site.producer.name, _Left(earlier.site.width, earlier.kept), bias)
        if step.form.kind != "merged":
            raise PlanError(
                f"{site.name}: its linear path reads what `{earlier.site.name}` becomes, a linear path itself. Apply "
                "that entry first, and fit this site on the result"
            )
        rows = fit is not None and (fit.producer is not None or fit.gate is not None)
        whole_bias = (
            fit is not None and fit.producer_bias is not None and not site.bridge.norm_before and not site.bridge.gated
        )
        if rows and step.form.consumers[i].bias and not whole_bias:
            raise PlanError(
                f"{site.name}: its rows were fitted for the bias of `{site.producer.name}`, which the entry of "
                f"`{earlier.site.name}` changes. Apply that entry first, or fit the bias, too"
            )
        before = _origin(earlier, plan)
        pixels = before.pixels
        if earlier.site.bridge.has("average"):
            pixels = "average"
        elif earlier.site.bridge.has("flatten"):
            pixels = "flatten"
        return replace(before, bias=None, pixels=pixels)
    return _Origin(site.producer.name)


def _aligned_with(values: Tensor, like: Tensor, channels_first: bool) -> Tensor:
    """(n,) aligned with the channels of `like`."""
    values = values.to(like.device, like.dtype)
    return values.reshape(-1, *[1] * (like.dim() - 2)) if channels_first else values


class _Fates(nn.Module):
    """f, an affine map or a constant, channel by channel."""

    def __init__(self, entry: Entry, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.entry = entry

    def forward(self, input: Tensor) -> Tensor:
        h = input  # PyTorch's name for it, by which a forward may call a layer
        entry = self.entry
        first = entry.site.bridge.image

        def vector(values: Tensor) -> Tensor:
            return _aligned_with(values, h, first)

        kept = self.f(h.clone())
        if entry.alphas is not None:
            a = vector(entry.alphas) if entry.alphas.numel() > 1 else entry.alphas.to(h.device, h.dtype)
            if entry.family == "prelu":
                kept = torch.clamp(h, min=0) + a * torch.clamp(h, max=0)
            else:
                kept = (a if entry.site.bridge.gated else a * h) + (1 - a) * kept
        is_kept = vector(entry.fates == Fate.KEEP).bool()
        is_linear = vector(entry.fates == Fate.LINEAR).bool()
        if entry.site.bridge.gated:
            return torch.where(is_kept, kept, is_linear.to(h.dtype))
        line = vector(entry.slopes) * h + vector(entry.offsets)
        return torch.where(is_kept, kept, torch.where(is_linear, line, vector(entry.offsets).expand_as(h)))


class _Affine:
    """Slopes and offsets of a gated site, before a consumer."""

    def __init__(self, entry: Entry) -> None:
        self.scale = torch.where(entry.fates == Fate.LINEAR, entry.slopes, (entry.fates == Fate.KEEP).double())
        self.shift = torch.where(entry.fates == Fate.KEEP, torch.zeros_like(entry.offsets), entry.offsets)
        self.channels_first = entry.site.bridge.image

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = read(args, kwargs)
        z = z * _aligned_with(self.scale, z, self.channels_first) + _aligned_with(self.shift, z, self.channels_first)
        return (z,), {}


class _FittedRows:
    """Some outputs of a producer from fitted rows; of a packed producer, in its first half (0) or its second (1)."""

    def __init__(
        self, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None, memory: _Memory, origin: _Origin,
        half: int | None,
    ) -> None:  # fmt: skip
        self.site, self.kept, self.weight, self.bias = site, kept, weight, bias
        self.memory, self.origin, self.half = memory, origin, half
        self.producer = cast("LinearMap", site.producer).name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        dim, kept, half = self.site.bridge.dim, self.kept.to(output.device), self.half
        rows = _apply(module, self.weight, self.memory.read(self.site))
        if self.bias is not None:
            rows = rows + _aligned_with(self.bias, rows, self.site.bridge.image)
        else:
            standing = self._standing(module, read(args, kwargs), output)
            if half is not None:
                standing = standing.chunk(2, dim)[half]
            rows = rows + standing.index_select(dim, kept)
        if half is None:
            return output.index_copy(dim, kept, rows)
        halves = list(output.chunk(2, dim))
        halves[half] = halves[half].index_copy(dim, kept, rows)
        return torch.cat(halves, dim)

    def _standing(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """What the producer gives beside its weights on what is left: its bias, and the answer to constants."""
        if self.origin.bias is not None:
            return _aligned_with(self.origin.bias, output, self.site.bridge.image).expand_as(output)
        gone = torch.zeros_like(x)
        if self.origin.left is not None and self.origin.reader == self.producer:
            gone = self.origin.left.without(x, self.site.bridge.dim)
        answer: Tensor = module.forward(gone)  # past the hooks
        return answer


class _Memory:
    """The last input of a module, as the producer of a site reads it."""

    def __init__(self, origin: _Origin, dim: int) -> None:
        self.origin, self.dim = origin, dim
        self.x: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = self.origin.of(read(args, kwargs), self.dim)

    def read(self, site: Site) -> Tensor:
        """What was remembered."""
        if self.x is None:
            raise PlanError(f"{site.name}: the consumer runs before the producer")
        return self.x


class _FittedConsumer:
    """A consumer with fitted maps in the place of its own."""

    def __init__(self, site: Site, fit: Fit, i: int, kept: Tensor, memory: _Memory, producer: nn.Module) -> None:
        self.site, self.fit, self.i, self.kept, self.memory = site, fit, i, kept, memory
        # in a list: a hook is copied with its module, and this must not make the producer a child of anything
        self.producer = [producer]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        z, fit, i = read(args, kwargs), self.fit, self.i
        y = torch.zeros_like(output)
        if len(self.kept):
            left = _Left(self.site.width, self.kept).of(z, self.site.bridge.dim)
            y = y + _apply(module, fit.consumers[i], left)
        if fit.ups:
            x = self.memory.read(self.site)
            if fit.down is None:
                y = y + _apply_full(self.producer[0], module, fit.ups[i], x)
            else:
                middle = _apply(self.producer[0], fit.down, x)
                if fit.down_bias is not None:
                    middle = middle + _aligned_with(fit.down_bias, middle, self.site.bridge.image)
                y = y + _apply(module, fit.ups[i], middle)
        return y + _aligned_with(fit.biases[i], y, y.dim() == 4 and isinstance(module, nn.Conv2d))


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
        spread = 1
        if inner == 0 and outer:
            spread = s1 * d2
        elif outer == 0 and inner:
            spread = d1
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
