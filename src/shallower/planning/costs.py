"""What a model costs, and what remains of that with a plan applied: one count for targets, plans and reports.

before = cost_of(model, example_inputs)         # measuring.cost
after = cost_after(plan, before, model)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from shallower.planning.forms import Step
from shallower.planning.forms.cuts import TensorCut
from shallower.planning.plan import Plan


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        params: number of parameters; tied ones count once.
        macs: multiply-accumulate operations on the example inputs.
        size: bytes of parameters and buffers.
        latency: seconds for one forward pass on the example inputs; None where it was not measured.
        kv: bytes of the KV cache for each token; None where the model returns none, or it was not counted.
    """

    params: int
    macs: int
    size: int
    latency: float | None = None
    kv: int | None = None


def cost_after(plan: Plan, before: Cost, model: nn.Module) -> Cost:
    """What remains of a model's cost with a plan applied, counted; the latency is not known.

    Args:
        plan: for this model.
        before: what the model costs.
        model: whose weights say how many bytes each takes.
    """
    size, kv = before.size, before.kv
    for step in plan.steps:
        size -= size_saved(step, model)
        if kv is not None:
            kv -= kv_saved(step, model)
    params, macs = before.params - plan.params_saved, before.macs - plan.macs_saved
    return replace(before, params=params, macs=macs, size=size, kv=kv, latency=None)


def size_saved(step: Step, model: nn.Module) -> int:
    """Bytes that a site takes less than its step found: parameters, and buffers of BatchNorms."""
    site, form = step.entry.site, step.form
    if site.branch is not None:
        return _branch_bytes(model, site.layers)
    if form.cuts:
        return sum(_cut_bytes(cut, model) for cut in form.cuts)
    each = _bytes_each(step, model)
    saved = (form.params_before - form.params) * each
    if site.producer is None:
        return saved
    left = 0
    if form.kind in ("narrower", "partial"):
        left = form.width
    for name in site.bridge.norms:
        saved += _norm_saved(model.get_submodule(name), site.width, left, each)
    if step.entry.fold_skip and site.residual is not None and site.residual.norm:
        saved += _norm_saved(model.get_submodule(site.residual.norm), form.consumers[0].d_out, 0, each)
    return saved


def _branch_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of the parameters and buffers of some modules that no other module has."""
    gone: set[nn.Module] = set()
    for name in names:
        gone.update(model.get_submodule(name).modules())
    own: dict[int, Tensor] = {}
    others: set[int] = set()
    for module in model.modules():
        held = {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
        if module in gone:
            own |= held
        else:
            others |= held.keys()
    return sum(t.numel() * t.element_size() for key, t in own.items() if key not in others)


def _cut_bytes(cut: TensorCut, model: nn.Module) -> int:
    """Bytes that a tensor loses."""
    before, after = cut.elements
    module, _, attribute = cut.tensor.rpartition(".")
    tensor = getattr(model.get_submodule(module), attribute)
    if isinstance(tensor, nn.Module):  # a list that loses entries
        tensor = next(tensor.parameters())
    return (before - after) * int(tensor.element_size())


def kv_saved(step: Step, model: nn.Module) -> int:
    """Bytes of the KV cache for each token that a step saves: a key and a value of each head that goes."""
    site = step.entry.site
    if not site.cached_each:
        return 0
    return len(step.entry.dropped) * site.cached_each * _bytes_each(step, model)


def _bytes_each(step: Step, model: nn.Module) -> int:
    """Bytes of one number of a site's weights."""
    site = step.entry.site
    names = list(site.layers)
    names += [place.module for place in site.bridge.activations]
    for name in names:
        for weight in model.get_submodule(name).parameters():
            if weight.is_floating_point():
                return weight.element_size()
    return 0


def _norm_saved(norm: nn.Module, width: int, left: int, each: int) -> int:
    """Bytes of a BatchNorm that go, beside `each` of a parameter for every channel, which are counted already.

    Args:
        norm: the module.
        width: its channels now.
        left: channels that stay; with 0 the whole norm goes, and its counter of batches too.
        each: bytes that a parameter of a channel was counted with.
    """
    saved = 0
    own: list[Tensor] = [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]
    for tensor in own:
        if tensor.numel() == width:
            counted = 0
            if isinstance(tensor, nn.Parameter):
                counted = each
            saved += (width - left) * (tensor.element_size() - counted)
        elif left == 0:
            saved += tensor.numel() * tensor.element_size()
    return saved
