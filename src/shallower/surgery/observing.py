"""What a model computes at some places and as its output, exactly enough to be compared.

expected = observed(simulated, Pass(inputs), taps, after=False)
difference = compared(taps, expected, observed(small, Pass(inputs), taps, after=True))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.algebra import wide
from shallower.core.failures import failing
from shallower.core.inputs import call, model_device
from shallower.core.modes import evaluating, single_pass
from shallower.core.outputs import without_heads
from shallower.core.trees import cloned, mapped, tensors, to_device
from shallower.core.watching import watching
from shallower.errors import ForwardError, SurgeryError
from shallower.sites import Site
from shallower.surgery.taps import Tap

ALLOWED = {torch.float32: 1e-5, torch.float64: 100 * torch.finfo(torch.float64).eps}
"""Relative error, norm of the difference over the norm, that is taken for rounding in any network."""

_MOST_ROUNDING = 1e-10
_NUDGES = 30


@dataclass(frozen=True)
class Pass:
    """What is run of a model, and on what.

    Attributes:
        inputs: of the whole model; of a part, the positional and the keyword arguments of each of its calls.
        part: dotted name of the part, "" for the whole model.
    """

    inputs: Any
    part: str = ""

    def over(self, model: nn.Module) -> Any:
        """What it gives.

        Raises:
            ForwardError: the model does not run on these inputs.
            OutOfMemoryError: there is not enough memory.
        """
        module = model.get_submodule(self.part)
        inputs = cloned(to_device(self.inputs, model_device(module)))
        with evaluating(module), exactly(module):
            if not self.part:
                return call(model, inputs)
            # several calls are one pass: what the part keeps from one to the next is there
            where = f"{self.part} does not run on the inputs that it has in the model"
            with failing(ForwardError, where), single_pass(module):
                return [module(*args, **kwargs) for args, kwargs in inputs]

    def converted(self, f: Callable[[Tensor], Tensor]) -> Pass:
        """The same on f of each tensor."""
        return Pass(mapped(f, self.inputs), self.part)


@dataclass
class Observed:
    """What a model computed: the outputs at each tap, one for each call, and the tensors of its own output."""

    taps: list[list[Tensor]]
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """Two models that do not compute the same.

    Attributes:
        site: where; None at the model's output.
        name: of the module whose output differs.
        size: the relative error.
        allowed: how large it may be.
        dtype: in which the two were compared.
    """

    site: Site | None
    name: str
    size: float
    allowed: float
    dtype: torch.dtype

    def error(self) -> SurgeryError:
        """The difference as an error that says what to do."""
        by = f"by {self.size:.1e} (relative), allowed {self.allowed:.0e}"
        if self.site is None:
            return SurgeryError(
                f"the output of the model after surgery differs from the simulated one {by}, though all sites agree. "
                "Something else reads a layer that was changed; apply the entries of the plan one by one to see which"
            )
        return SurgeryError(
            f"{self.site.name} ({self.site.kind}, {self.site.width} channels): the result at `{self.name}` differs "
            f"from the simulated one {by}. The model computes something else here than the site describes. Exclude "
            f'the site: sites.select(lambda s: s.name != "{self.site.name}")'
        )


def observed(model: nn.Module, run: Pass, taps: Sequence[Tap], *, after: bool) -> Observed:
    """Run the model in eval mode, and keep what the taps and the output give.

    Args:
        model: left as it is.
        run: what is run of it.
        taps: places in what is run.
        after: whether this is the model after surgery.

    Raises:
        ForwardError: the model does not run on these inputs.
        OutOfMemoryError: there is not enough memory.
        SurgeryError: a tap has no module.
    """
    found = Observed([[] for _ in taps])
    modules = {i: tap.module_in(model) for i, tap in enumerate(taps)}
    hooks = {i: _output_to(tap, found.taps[i], after) for i, tap in enumerate(taps)}
    with watching(modules, after=hooks):
        output = run.over(model)
    found.outputs = [t.detach().clone() for t in tensors(without_heads(output))]
    return found


def _output_to(tap: Tap, seen: list[Tensor], after: bool) -> Any:
    def keep(_: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], given: Any) -> None:
        output = next(tensors(given))  # the first, where a layer gives something beside it
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            raise SurgeryError(
                f"{tap.site.name}: `{tap.name}` runs inside torch.vmap or another transform of torch.func, where it "
                f'cannot be compared. Exclude the site: sites.select(lambda s: s.name != "{tap.site.name}")'
            )
        seen.append(tap.read(output, after=after))

    return keep


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """No TF32 and no autocast."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    device = model_device(model).type
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", cudnn)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if torch.amp.is_autocast_available(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def compared(
    taps: Sequence[Tap],
    expected: Observed,
    found: Observed,
    allowed: float | None = None,
    nudged: Observed | None = None,
) -> Difference | None:
    """Where the two differ first, or None.

    Args:
        taps: of both.
        expected: of the simulated model.
        found: of the model after surgery.
        allowed: the relative error that is taken for rounding; by the type where None.
        nudged: of the simulated model with the last bit of its numbers changed. Rounding may make 30 times the
            difference that this makes, though no more than 1e-10.

    Raises:
        SurgeryError: something did not run, or has another shape.
    """
    check_runs(taps, expected, found)
    usual = expected if nudged is None else nudged
    for tap, y, z, around in zip(taps, expected.taps, found.taps, usual.taps, strict=True):
        if tap.loose and [t.shape for t in y] != [t.shape for t in z]:
            continue
        difference = _first_difference(tap.site, tap.name, y, z, around, allowed)
        if difference is not None:
            return difference
    check_shapes(expected.outputs, found.outputs)
    return _first_difference(None, "output", expected.outputs, found.outputs, usual.outputs, allowed)


def check_runs(taps: Sequence[Tap], expected: Observed, found: Observed) -> None:
    """Every place ran in both models, and as often in both.

    Raises:
        SurgeryError: one did not.
    """
    for tap, y, z in zip(taps, expected.taps, found.taps, strict=True):
        exclude = f'Or exclude the site: sites.select(lambda s: s.name != "{tap.site.name}")'
        if not y or len(y) != len(z):
            raise SurgeryError(
                f"{tap.site.name}: `{tap.name}` runs {len(y)} times on the example inputs with the plan simulated and "
                f"{len(z)} times after surgery, so the result cannot be proven there. Give inputs on which it runs; "
                "let the model hold its modules as attributes and not in lists or in a forward that was set on the "
                f"instance. {exclude}"
            )


def check_shapes(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """The outputs of two models have the same shapes.

    Raises:
        SurgeryError: they have not.
    """
    before, after = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
    if before != after:
        raise SurgeryError(f"after surgery the model's outputs have the shapes {after}, and before {before}")


def _first_difference(
    site: Site | None,
    name: str,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    usual: Sequence[Tensor],
    allowed: float | None,
) -> Difference | None:
    for y, z, around in zip(expected, found, usual, strict=True):
        if y.shape != z.shape:
            where = "the model" if site is None else site.name
            raise SurgeryError(f"{where}: `{name}` has shape {tuple(z.shape)}, not {tuple(y.shape)}")
        limit = allowed or ALLOWED.get(y.dtype, ALLOWED[torch.float32])
        limit = max(limit, min(_MOST_ROUNDING, _NUDGES * relative_error(y, around)))
        error = relative_error(y, z)
        if error > limit:
            return Difference(site, name, error, limit, y.dtype)
    return None


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over the norm; equal infinities and equal NaNs do not differ, nor do whole numbers."""
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    if not expected.is_floating_point():
        return 0.0
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = torch.where(same.to(wide(found).device), 0.0, wide(found) - wide(expected))
    if not bool(difference.isfinite().all()):
        return float("inf")
    size = wide(torch.where(expected.isfinite(), expected, 0.0)).norm()
    error = difference.norm()
    return float(error / size if size > 0 else error)
