"""Apply a plan to a model: merge, slice, and prove that nothing else changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from shallower.calibrating import recalibration
from shallower.core.inputs import Inputs, InputsOf, default_inputs_of
from shallower.core.modes import without_inference_mode
from shallower.core.tensors import has_no_numbers
from shallower.errors import PlanError
from shallower.modules.offloading import with_mapped_weights
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.surgery.checking import check_fits
from shallower.surgery.configs import follow
from shallower.surgery.padding import border_error
from shallower.surgery.proof import proven

M = TypeVar("M", bound=nn.Module)


@without_inference_mode()
def apply(
    model: M,
    plan: Plan,
    example_inputs: Inputs,
    *,
    recalibrate: Iterable[Any] | None = None,
    inputs_of: InputsOf = default_inputs_of,
) -> M:
    """A new model in which every site has become what the plan says; the argument is untouched.

        small = sh.apply(model, sh.Plan.collapse(sites), example_inputs)
        small = sh.apply(model, plan, example_inputs, recalibrate=batches)      # and measure BatchNorms again

    The result is proven: it agrees with the plan simulated on the original layers, on the example inputs, at each
    site's consumers and at the model's output, up to a relative error (norm of the difference over the norm) of 1e-5 in
    float32 and 1e-10 in float64. Narrower weights are proven in float32 before they are rounded again, and the rounded
    result must answer like that. Of a model on the meta device only shapes are compared.

    Args:
        model: perhaps with a method attached; a detached copy is changed. Of an offloaded model the weights are mapped
            from their files, and those of the result that stay as they are remain so.
        plan: for this model.
        example_inputs: what the model is called with.
        recalibrate: batches over which the BatchNorms that remain measure their statistics again, after the proof. Of
            use where much was taken away and no training follows.
        inputs_of: picks the model's inputs out of such a batch.

    Returns:
        A model with the argument's class, mode (train or eval), dtypes and devices.

    Raises:
        PlanError: the plan does not fit the model, or merges layers that would differ along the border; the error says
            by how much on the example inputs.
        SurgeryError: the result differs from the simulation beyond rounding, or a part of it does not run.
        OutOfMemoryError: there is not enough memory.

    Warns:
        CostWarning: a site does not become cheaper.
    """
    model = with_mapped_weights(model)
    check_fits(model, plan)
    plan.warn_of_cost()
    todo = steps(plan.entries)
    _refuse_border_errors(model, todo, example_inputs)
    small = proven(model, todo, example_inputs)
    follow(small, example_inputs)
    if recalibrate is not None:
        recalibration.recalibrate(small, recalibrate, inputs_of=inputs_of)
    return small


def _refuse_border_errors(model: nn.Module, todo: Sequence[Step], inputs: Inputs) -> None:
    for step in todo:
        site, why = step.entry.site, step.form.why
        if step.form.kind != "merged" or not why:
            continue
        measured = ""
        if site.bridge.not_merged is None and not any(has_no_numbers(p) for p in model.parameters()):
            error = border_error(model, step.entry, inputs)
            names = ", ".join(f"`{m.name}`" for m in site.consumers)
            measured = f". Merged as it is, the output of {names} would differ by {error:.1e} on the example inputs"
        raise PlanError(f"{site.name}: its layers cannot be merged: {why}{measured}")
