"""Surgery on a whole model in float32 or float64, compared with the plan simulated on it.

small = whole_network(model, todo, run, edits_of)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from shallower.core.failures import failing, sentence
from shallower.core.tensors import has_no_numbers
from shallower.core.text import listing
from shallower.core.trees import doubled
from shallower.errors import ForwardError, SiteError, SurgeryError
from shallower.modules.attachment import detached_copy
from shallower.modules.edits import Edit, perform
from shallower.planning.forms import Step
from shallower.surgery.observing import (
    ALLOWED,
    Difference,
    Observed,
    Pass,
    check_shapes,
    compared,
    observed,
    relative_error,
)
from shallower.surgery.simulation import impose
from shallower.surgery.taps import Tap, taps_of

M = TypeVar("M", bound=nn.Module)

EditsOf = Callable[[Step, nn.Module], list[Edit]]
"""The edits of a step, from the model that the earlier ones left."""

LOOSE = 8
"""How many units of rounding the output of a model in a narrow type may be away from that in float32."""


def whole_network(model: M, todo: Sequence[Step], run: Pass, edits_of: EditsOf, *others: nn.Module) -> M:
    """The model after surgery, proven as a whole.

    Args:
        model: in float32 or float64; untouched.
        todo: the steps of a plan.
        run: what is run of it to compare.
        edits_of: what surgery does.
        others: further models on which the same edits are performed.

    Raises:
        SurgeryError: the result differs from the simulated model beyond rounding.
    """
    taps = taps_of(todo)
    expected = simulated(model, todo, run, taps)
    small = detached_copy(model)
    done(todo, edits_of, small, *others)
    found = after_surgery(small, todo, run, taps)
    difference = compared(taps, expected, found)
    if difference is not None and difference.dtype == torch.float64:
        nudged = simulated(_nudged(model), todo, run.converted(_nudge), taps)
        difference = compared(taps, expected, found, nudged=nudged)
    if difference is not None and difference.dtype == torch.float32:
        del expected
        difference = _unless_rounding(difference, model, small, todo, run, edits_of)
    if difference is not None:
        raise difference.error()
    return small


def _unless_rounding(
    difference: Difference, model: nn.Module, small: nn.Module, todo: Sequence[Step], run: Pass, edits_of: EditsOf
) -> Difference | None:  # fmt: skip
    """The difference in float64; None where nothing but the rounding of float32, amplified by a deep network, is left.

    The same surgery in float64 must agree with the simulation, and the result must be its rounding.
    """
    taps = taps_of(todo)
    try:
        double = detached_copy(model).double()
        expected = simulated(double, todo, run.converted(doubled), taps)
        done(todo, edits_of, double)
        found = observed(double, run.converted(doubled), taps, after=True)
    except (ForwardError, SurgeryError):  # it computes in float32 whatever its weights are
        return difference
    exact = double.state_dict()
    if any(relative_error(exact[name], tensor) > 1e-6 for name, tensor in small.state_dict().items()):
        return difference
    return compared(taps, expected, found, allowed=ALLOWED[torch.float32])


def _nudged(model: M) -> M:
    """A copy with the last bit of every float64 number changed: how much a network makes of rounding."""
    copied = detached_copy(model)
    copied._apply(_nudge)  # type: ignore[no-untyped-call]
    return copied


def _nudge(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float64 or has_no_numbers(tensor):
        return tensor
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) < 0.5
    towards = torch.where(up.to(tensor.device), torch.inf, -torch.inf).double()
    return torch.nextafter(tensor, towards)


def simulated(model: nn.Module, todo: Sequence[Step], run: Pass, taps: Sequence[Tap]) -> Observed:
    """What the model computes with its plan simulated.

    Raises:
        SurgeryError: the model does not run on these inputs.
    """
    copied = detached_copy(model)
    impose(copied, todo)
    try:
        return observed(copied, run, taps, after=False)
    except ForwardError as error:
        cause = error.__cause__ or error
        raise SurgeryError(
            f"{_site_names(todo)}: the model does not run on the example inputs with the plan simulated on its own "
            f"layers: {sentence(cause)}. Weights of narrow types are proven in float32, which a forward must allow"
        ) from cause


def done(todo: Sequence[Step], edits_of: EditsOf, model: nn.Module, *others: nn.Module) -> None:
    """Perform the edits of these steps, which are worked out on `model`, on it and on the others.

    Raises:
        SurgeryError: the model does not allow an edit.
    """
    for step in todo:
        name = step.entry.site.name
        try:
            with failing(SurgeryError, f"{name}: surgery fails", "Exclude the site"):
                for edit in edits_of(step, model):
                    for each in (model, *others):
                        perform(each, edit)
                for each in (model, *others):
                    _refuse_infinite(each, step)
        except SiteError as error:
            raise SurgeryError(f"{name}: surgery fails: {error}. Exclude the site") from error


def _refuse_infinite(model: nn.Module, step: Step) -> None:
    for m in step.form.maps:
        for parameter in model.get_submodule(m.name).parameters():
            if not has_no_numbers(parameter) and not bool(parameter.isfinite().all()):
                raise SurgeryError(
                    f"{step.entry.site.name}: the layer `{m.name}` after surgery has numbers that {parameter.dtype} "
                    "cannot hold. Convert the model to a wider type first, or exclude the site"
                )


def after_surgery(model: nn.Module, todo: Sequence[Step], run: Pass, taps: Sequence[Tap]) -> Observed:
    """What the model computes after surgery.

    Raises:
        SurgeryError: it does not run any more.
    """
    try:
        return observed(model, run, taps, after=True)
    except ForwardError as error:
        cause = error.__cause__ or error
        raise SurgeryError(
            f"{_site_names(todo)}: the model after surgery does not run on the example inputs: {sentence(cause)}. "
            "Something in its forward depends on the width or on an attribute of a changed layer. Apply the entries of "
            "the plan one by one to see which, and exclude that site"
        ) from cause


def _site_names(todo: Sequence[Step]) -> str:
    if not todo:
        return "an empty plan"
    return listing(step.entry.site.name for step in todo)


# ------------------------------------------------------------------------------------------------------- narrow types


def is_narrow(tensor: Tensor) -> bool:
    """Whether a type is too coarse for a proof."""
    return tensor.is_floating_point() and tensor.dtype not in ALLOWED


def widened(model: M) -> M:
    """A detached copy in float32, where the model has narrower numbers."""
    copied = detached_copy(model)
    widen(copied)
    return copied


def widen(module: nn.Module) -> None:
    """Turn a module into float32 in place, where it has narrower numbers."""
    module._apply(wide_enough)  # type: ignore[no-untyped-call]


def wide_enough(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it is narrower."""
    if is_narrow(tensor):
        return tensor.float()
    return tensor


def check_rounded(exact: nn.Module, small: nn.Module) -> None:
    """A model in its narrow type is the rounding of the proven one in float32.

    Raises:
        SurgeryError: a tensor is not.
    """
    proven = exact.state_dict()
    for name, tensor in small.state_dict().items():
        if not is_narrow(tensor):
            continue
        # of a number that is rounded twice, the last bit may differ
        error = relative_error(proven[name].to(tensor.dtype), tensor)
        if error > torch.finfo(tensor.dtype).eps:
            raise SurgeryError(f"{name}: in {tensor.dtype} it differs from what was proven in float32 by {error:.1e}")


def check_answers(
    exact: nn.Module, small: nn.Module, model: nn.Module, todo: Sequence[Step], run: Pass, dtype: torch.dtype
) -> None:
    """A model in its narrow type answers as it does in float32, within the rounding of that type.

    Args:
        exact: the model after surgery in float32.
        small: the same, rounded.
        model: before surgery.
        todo: the steps of the plan.
        run: of the whole model.
        dtype: the narrow type.

    Raises:
        SurgeryError: it answers differently.
    """
    wide_run = run.converted(wide_enough)
    error = distance(observed(exact, wide_run, (), after=True), after_surgery(small, todo, run, ()))
    allowed = LOOSE * torch.finfo(dtype).eps
    if error > allowed:
        # a network may amplify rounding: as much as it does with the plan simulated is no fault of surgery
        usual = distance(simulated(widened(model), todo, wide_run, ()), simulated(model, todo, run, ()))
        allowed = max(allowed, 4 * usual)
    check_distance(error, allowed, dtype)


def check_distance(error: float, allowed: float, dtype: torch.dtype) -> None:
    """A model in a narrow type is no further from the exact one than allowed.

    Raises:
        SurgeryError: it is.
    """
    if error > allowed:
        raise SurgeryError(
            f"the output of the model after surgery in {dtype} differs by {error:.1e} (relative) from what was proven, "
            f"allowed {allowed:.0e}. Convert the model to float32, and apply the plan to that"
        )


def distance(exact: Observed, rounded: Observed) -> float:
    """The greatest relative error of an output."""
    check_shapes(exact.outputs, rounded.outputs)
    pairs = zip(exact.outputs, rounded.outputs, strict=True)
    return max((relative_error(a, b) for a, b in pairs), default=0.0)
