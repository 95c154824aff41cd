"""The proof that surgery changed nothing but what the plan says.

Three ways, chosen by the weights' type:
whole network   float32 and float64: simulated model and result on the example inputs, at every consumer and at the
                output
site by site    narrower types: each site alone in float32, on the inputs that it has in the network, before rounding
shapes          meta tensors have no numbers
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.core.inputs import Inputs, call, model_device, tensors, to_device
from shallower.core.tensors import has_no_numbers
from shallower.core.trees import cloned, doubled
from shallower.errors import SurgeryError
from shallower.modules.attachment import detached_copy
from shallower.modules.rewriting import externalise
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Place, Site
from shallower.surgery.simulation import fated, hook, impose

Operate = Callable[[nn.Module, Step], None]

ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative error, norm of the difference over the norm, that is taken for rounding."""


class Proof:
    """Compares a model before and after; this one compares nothing."""

    @staticmethod
    def of(model: nn.Module, plan: Plan, inputs: Inputs, operate: Operate) -> Proof:
        """The proof that suits the model's weights, with the simulated side already observed.

        Args:
            model: before surgery.
            plan: that is applied.
            inputs: example inputs.
            operate: the surgery of one step on a model, in place.
        """
        names = {m.name for entry in plan.entries for m in entry.site.maps}
        weights = [p for name in sorted(names) for p in model.get_submodule(name).parameters()]
        weights = weights or list(model.parameters())
        if any(has_no_numbers(p) for p in weights):
            return _Shapes(model, plan, inputs)
        if any(p.dtype not in ALLOWED for p in weights if p.is_floating_point()):
            return _SiteBySite(plan, inputs)
        return _Whole(model, plan, inputs, operate)

    @contextmanager
    def of_step(self, model: nn.Module, step: Step) -> Iterator[None]:  # noqa: ARG002
        """Around the surgery of one site."""
        yield

    def check(self, model: nn.Module) -> None:
        """After all surgery.

        Raises:
            SurgeryError: the model differs from the simulated one beyond rounding.
        """


@dataclass(frozen=True)
class _Tap:
    """The output of a consumer: which of its channels can be compared after surgery, before and after.

    Where a skip is folded into the consumer, the output of the sum, which both networks have as a module at `place`.
    """

    site: Site
    name: str
    before: Tensor | None = None
    after: Tensor | None = None
    dim: int = -1
    place: Place | None = None

    def module(self, model: nn.Module) -> nn.Module:
        """Whose output it is."""
        return model.get_submodule(self.name if self.place is None else externalise(model, self.place))

    @property
    def key(self) -> str:
        """What it is kept under, and called."""
        return self.name if self.place is None else str(self.place)


@dataclass
class _Observed:
    """What a model computed."""

    taps: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


class _Whole(Proof):
    def __init__(self, model: nn.Module, plan: Plan, inputs: Inputs, operate: Operate) -> None:
        self.model, self.plan, self.inputs, self.operate = model, plan, inputs, operate
        self.taps = _taps(steps(plan.entries))
        with _running(plan, "with the plan simulated"):
            simulated = detached_copy(model)
            impose(simulated, plan)
            self.expected = _observe(simulated, inputs, self.taps, before=True)

    def check(self, model: nn.Module) -> None:
        with _running(self.plan, "after surgery"):
            found = _observe(model, self.inputs, self.taps, before=False)
        try:
            _compare(self.taps, self.expected, found)
        except _DifferenceError as difference:
            if difference.dtype != torch.float32:
                raise difference.error() from None
            self._check_in_float64(model, difference)

    def _check_in_float64(self, model: nn.Module, difference: _DifferenceError) -> None:
        """A deep network amplifies the rounding of float32; in float64 only what surgery did wrong is left.

        The same surgery in float64 must agree with the simulation, and the result must be its rounding.
        """
        self.expected = _Observed()
        inputs = doubled(self.inputs)
        try:
            double = detached_copy(self.model).double()
            impose(double, self.plan)
            expected = _observe(double, inputs, self.taps, before=True)
            double = detached_copy(self.model).double()
            for step in steps(self.plan.entries):
                self.operate(double, step)
            found = _observe(double, inputs, self.taps, before=False)
        except RuntimeError:  # it computes in float32 whatever its weights are
            raise difference.error() from None
        rounded, exact = model.state_dict(), double.state_dict()
        if any(_relative_error(exact[name], tensor) > 1e-6 for name, tensor in rounded.items()):
            raise difference.error()
        try:
            _compare(self.taps, expected, found, allowed=ALLOWED[torch.float32])
        except _DifferenceError as again:
            raise again.error() from None


class _Shapes(Proof):
    def __init__(self, model: nn.Module, plan: Plan, inputs: Inputs) -> None:
        self.inputs = inputs
        self.expected: list[torch.Size] | None = None
        self.plan = plan
        try:
            simulated = detached_copy(model)
            impose(simulated, plan)
            observed = _observe(simulated, inputs, [], before=True)
        except (RuntimeError, NotImplementedError):  # reads numbers that a meta tensor does not have
            return
        self.expected = [t.shape for t in observed.outputs]

    def check(self, model: nn.Module) -> None:
        if self.expected is not None:
            with _running(self.plan, "after surgery"):
                found = _observe(model, self.inputs, [], before=False).outputs
            _compare_shapes(self.expected, found)


class _SiteBySite(Proof):
    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.plan, self.inputs = plan, inputs
        todo = steps(plan.entries)
        consumed = {m.name for step in todo for m in step.entry.site.consumers}
        producers = {step.entry.site.name: step.entry.site.producer for step in todo}
        self.first = [p.name for p in producers.values() if p is not None and p.name not in consumed]
        self.seen: dict[str, Tensor] = {}
        self.shapes: list[torch.Size] | None = None

    @contextmanager
    def of_step(self, model: nn.Module, step: Step) -> Iterator[None]:
        site, entry = step.entry.site, step.entry
        if site.producer is None or site.activation is None:
            yield
            return
        x = self._input_of(model, site.producer.name).float()
        modules = _modules(model, site)
        with torch.no_grad(), _exact(model):
            before = _parts(model, site)
            hook(entry, before[site.producer.name], before)
            before[str(site.activation)] = fated(entry, before[str(site.activation)]).eval()
            expected = _chain(site, before, x)
            if entry.fold_skip and site.residual is not None:
                norm = before.get(site.residual.norm)
                expected = [(y if norm is None else norm(y)) + x for y in expected]
            types = {key: _type_of(module) for key, module in modules.items()}
            for module in modules.values():
                module.float()
            yield
            found = _chain(site, _parts(model, site), x)
            for key, module in _modules(model, site).items():
                if types[key] is not None:
                    module.to(types[key])
        for y, z in zip(expected, found, strict=True):
            error = _relative_error(y, z)
            if error > ALLOWED[torch.float32]:
                raise _DifferenceError(site, "", error, ALLOWED[torch.float32], torch.float32).error()

    def _input_of(self, model: nn.Module, producer: str) -> Tensor:
        if self.shapes is None:
            self.shapes = self._watch(model, self.first)
        if producer not in self.first:
            self._watch(model, [producer])
        return self.seen.pop(producer)

    def _watch(self, model: nn.Module, names: Sequence[str]) -> list[torch.Size]:
        def keep(name: str) -> Any:
            def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self.seen[name] = x.detach().clone()

            return look

        handles = [
            model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in set(names)
        ]
        try:
            outputs = _observe(model, self.inputs, [], before=True).outputs
        finally:
            for handle in handles:
                handle.remove()
        return [t.shape for t in outputs]

    def check(self, model: nn.Module) -> None:
        with _running(self.plan, "after surgery"):
            outputs = _observe(model, self.inputs, [], before=False).outputs
        if self.shapes is not None:
            _compare_shapes(self.shapes, outputs)


class _DifferenceError(Exception):
    """A comparison that failed."""

    def __init__(self, site: Site | None, name: str, error: float, allowed: float, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.site, self.name, self.size, self.allowed, self.dtype = site, name, error, allowed, dtype

    def error(self) -> SurgeryError:
        by = f"by {self.size:.1e} (relative), allowed {self.allowed:.0e}"
        if self.site is None:
            return SurgeryError(
                f"the output of the model after surgery differs from the simulated one {by}, though all sites agree. "
                "Something else reads a layer that was changed; apply the entries of the plan one by one to see which"
            )
        at = f" at `{self.name}`" if self.name else ""
        return SurgeryError(
            f"{self.site.name} ({self.site.kind}, {self.site.width} channels): the result{at} differs from the "
            f"simulated one {by}. The model does not compute there what the site says. Exclude the site: "
            f'sites.select(lambda s: s.name != "{self.site.name}")'
        )


@contextmanager
def _running(plan: Plan, when: str) -> Iterator[None]:
    """A forward pass that must not fail."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        names = [entry.site.name for entry in plan.entries]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise SurgeryError(
            f"{shown}: the model {when} does not run on the example inputs: {error}. Something in it depends on the "
            "width of a changed layer. Apply the entries of the plan one by one to see which, and exclude that site"
        ) from error


def _taps(todo: Sequence[Step]) -> list[_Tap]:
    roles: dict[str, tuple[Step, LinearMap]] = {}
    for step in todo:
        for m in (step.entry.site.producer, step.entry.site.gate):
            if m is not None:
                roles[m.name] = (step, m)
    taps = []
    for step in todo:
        residual = step.entry.site.residual
        if step.entry.fold_skip and residual is not None:
            taps.append(_Tap(step.entry.site, "", place=residual.place))
            continue
        for m in step.entry.site.consumers:
            dim = 1 if m.kind == "conv2d" else -1
            if m.name not in roles:
                taps.append(_Tap(step.entry.site, m.name, dim=dim))
                continue
            later, _ = roles[m.name]
            kept, rank, width = later.entry.kept, later.form.rank, later.entry.site.width
            if len(kept) == 0:
                continue
            before, after = kept, torch.arange(len(kept))
            if later.entry.site.packed:
                before = torch.cat([before, before + width])
                after = torch.cat([after, after + len(kept) + rank])
            taps.append(_Tap(step.entry.site, m.name, before, after, dim))
    return taps


def _observe(model: nn.Module, inputs: Inputs, taps: Sequence[_Tap], *, before: bool) -> _Observed:
    """Run the model in eval mode and keep what the taps and the output give; mode and random state are as before."""
    observed = _Observed({tap.key: [] for tap in taps})

    def keep(tap: _Tap) -> Any:
        channels = tap.before if before else tap.after

        def look(_: nn.Module, __: Any, y: Tensor) -> None:
            y = y.detach()
            part = y.clone() if channels is None else y.index_select(tap.dim, channels.to(y.device))
            observed.taps[tap.key].append(part)

        return look

    handles = [tap.module(model).register_forward_hook(keep(tap)) for tap in taps]
    modes = {module: module.training for module in model.modules()}
    device = model_device(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _exact(model):
            model.eval()
            output = call(model, cloned(to_device(inputs, device)))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    observed.outputs = [t.detach() for t in tensors(_without_heads(output))]
    return observed


def _without_heads(output: Any) -> Any:
    """An output without what has a size for each attention head: a cache of keys and values, attention weights."""
    if isinstance(output, Mapping):
        kept = {key: value for key, value in output.items() if not str(key).endswith("attentions")}
        return {key: _without_heads(value) for key, value in kept.items()}
    if isinstance(output, (tuple, list)):
        return [_without_heads(item) for item in output]
    return None if any(c.__module__ == "transformers.cache_utils" for c in type(output).__mro__) else output


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """No TF32 and no autocast."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    device = model_device(model).type
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if torch.amp.is_autocast_available(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def _compare(taps: Sequence[_Tap], expected: _Observed, found: _Observed, allowed: float | None = None) -> None:
    for tap in taps:
        y, z = expected.taps[tap.key], found.taps[tap.key]
        if len(y) != len(z):
            raise SurgeryError(
                f"{tap.site.name}: `{tap.key}` runs {len(z)} times after surgery, and {len(y)} times before. "
                f'Exclude the site: sites.select(lambda s: s.name != "{tap.site.name}")'
            )
        _judge(tap.site, tap.key, y, z, allowed)
    _compare_shapes([t.shape for t in expected.outputs], found.outputs)
    numbers = [i for i, t in enumerate(expected.outputs) if t.is_floating_point()]
    for i in numbers:
        _judge(None, "output", [expected.outputs[i]], [found.outputs[i]], allowed)


def _judge(site: Site | None, name: str, y: list[Tensor], z: list[Tensor], allowed: float | None) -> None:
    for a, b in zip(y, z, strict=True):
        if a.shape != b.shape:
            raise SurgeryError(
                f"{site.name if site else 'the model'}: `{name}` has shape {tuple(b.shape)}, not {tuple(a.shape)}"
            )
        limit = allowed or ALLOWED.get(a.dtype, ALLOWED[torch.float32])
        error = _relative_error(a, b)
        if error > limit:
            raise _DifferenceError(site, name, error, limit, a.dtype)


def _compare_shapes(expected: Sequence[torch.Size], found: Sequence[Tensor]) -> None:
    shapes = [t.shape for t in found]
    if list(expected) != shapes:
        raise SurgeryError(
            f"after surgery the model's outputs have the shapes {[tuple(s) for s in shapes]}, and before "
            f"{[tuple(s) for s in expected]}"
        )


def _relative_error(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over the norm; equal infinities and equal NaNs do not differ."""
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = torch.where(same, 0.0, found.double() - expected.double())
    if not bool(difference.isfinite().all()):
        return float("inf")
    size = torch.where(expected.isfinite(), expected.double(), 0.0).norm()
    error = difference.norm()
    return float(error / size if size > 0 else error)


def _modules(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    """The maps and BatchNorms of a site, and the BatchNorm in front of the sum around it, by name."""
    norms = [site.norm_before, site.norm_after, *(n for b in site.between for n in (b.norm_before, b.norm_after))]
    norms += [] if site.residual is None else [site.residual.norm]
    names = [*(m.name for m in site.maps), *(norm for norm in norms if norm)]
    return {name: model.get_submodule(name) for name in names}


def _parts(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    """Copies in float32 of all that a site consists of, by name; activations by their place."""
    parts = {name: copy.deepcopy(module).float().eval() for name, module in _modules(model, site).items()}
    for place in (site.activation, *(b.activation for b in site.between)):
        if place is None:
            continue
        parts[str(place)] = _copy_of(model, place).float().eval()
        for name, part in list(parts.items()):  # a norm that holds the activation behind it
            inner = place.module.removeprefix(f"{name}.")
            if inner != place.module and not place.calls and not isinstance(part, nn.Identity):
                part.set_submodule(inner, nn.Identity())
    return parts


def _copy_of(model: nn.Module, place: Place) -> nn.Module:
    """A copy of what stands at a place; the model stays as it is."""
    if place.calls:
        owner = copy.deepcopy(model.get_submodule(place.module))
        return owner.get_submodule(externalise(owner, Place("", place.calls)))
    try:
        return copy.deepcopy(model.get_submodule(place.module))
    except AttributeError:  # it went with the norm that held it
        return nn.Identity()


def _chain(site: Site, modules: Mapping[str, nn.Module], x: Tensor) -> list[Tensor]:
    """What a site computes, from the producer's input to the consumers' outputs."""
    dim = 1 if site.channels_first else -1
    f = modules[str(site.activation)]
    h = modules[cast("LinearMap", site.producer).name](x)
    if site.packed:
        first, second = h.chunk(2, dim)
        gate, up = (first, second) if site.packed == "gate-first" else (second, first)
        z = f(gate) * up
    elif site.gate is not None:
        z = f(modules[site.gate.name](x)) * h
    else:
        z = f(modules[site.norm_before](h) if site.norm_before else h)
    z = modules[site.norm_after](z) if site.norm_after else z
    for b in site.between:
        for name in (b.map.name, b.norm_before, "" if b.activation is None else str(b.activation), b.norm_after):
            z = modules[name](z) if name else z
    first = site.consumers[0]
    if site.averaged:
        z = z.mean((2, 3), keepdim=first.kind == "conv2d")
    elif site.pooled and first.size != (0, 0):  # whatever pools each channel by itself would do
        z = F.adaptive_max_pool2d(z, first.size)
    if site.flattened:
        z = z.flatten(1)
    return [modules[m.name](z) for m in site.consumers]


def _type_of(module: nn.Module) -> torch.dtype | None:
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        return module.running_var.dtype
    return next((p.dtype for p in module.parameters()), None)
