"""Surgery on a model, proven: it changed nothing but what the plan says.

    small = proven(model, steps(plan.entries), example_inputs)

The plan is simulated on a copy of the original layers, surgery is done on another copy, and both run on the example
inputs. They must agree at every place where a site is read and at the output of the model:

float32, float64    up to rounding
narrower types      up to rounding in float32, before the weights are rounded; then the result must answer like that
short of memory     narrower types block by block: each part of the model that holds a site, in float32
meta tensors        in their shapes
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from shallower.core.inputs import Inputs, model_device
from shallower.core.memory import free_bytes
from shallower.core.tensors import has_no_numbers
from shallower.errors import ForwardError
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import is_mapped
from shallower.planning.forms import Step
from shallower.surgery.blocks import block_by_block
from shallower.surgery.observing import Pass, check_runs, check_shapes, observed
from shallower.surgery.operating import edits_of_step
from shallower.surgery.simulation import impose
from shallower.surgery.taps import taps_of
from shallower.surgery.whole import (
    EditsOf,
    after_surgery,
    check_answers,
    check_rounded,
    done,
    is_narrow,
    whole_network,
    wide_enough,
    widened,
)

M = TypeVar("M", bound=nn.Module)


def proven(model: M, todo: Sequence[Step], inputs: Inputs, edits_of: EditsOf = edits_of_step) -> M:
    """A copy of the model after these steps, which agrees with the plan simulated.

    Args:
        model: untouched.
        todo: the steps of a plan, in order.
        inputs: example inputs.
        edits_of: what surgery does.

    Raises:
        SurgeryError: the result differs from the simulated model beyond rounding.
        PlanError: the plan does not fit the model.
        OutOfMemoryError: there is not enough memory.
    """
    run = Pass(inputs)
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(map(has_no_numbers, tensors)):
        return _in_shapes(model, todo, run, edits_of)
    narrow = list(filter(is_narrow, tensors))
    if not narrow:
        return whole_network(model, todo, run, edits_of)
    if _is_short_of_memory(model):
        return block_by_block(model, todo, run, edits_of)
    small = detached_copy(model)
    exact = whole_network(widened(model), todo, run.converted(wide_enough), edits_of, small)
    check_rounded(exact, small)
    check_answers(exact, small, model, todo, run, narrow[0].dtype)
    return small


def _in_shapes(model: M, todo: Sequence[Step], run: Pass, edits_of: EditsOf) -> M:
    """The model after surgery; it has no numbers, so that only shapes are compared."""
    taps = taps_of(todo)
    simulated, small = detached_copy(model), detached_copy(model)
    impose(simulated, todo)
    done(todo, edits_of, small)
    try:
        expected = observed(simulated, run, taps, after=False)
    except ForwardError:  # it reads numbers that a meta tensor does not have
        return small
    found = after_surgery(small, todo, run, taps)
    check_runs(taps, expected, found)
    for tap, y, z in zip(taps, expected.taps, found.taps, strict=True):
        if not tap.loose:
            check_shapes(y, z)
    check_shapes(expected.outputs, found.outputs)
    return small


def _is_short_of_memory(model: nn.Module) -> bool:
    """Whether two copies in float32 would not fit, or the weights are mapped from files since not even one would."""
    if any(map(is_mapped, model.parameters())):
        return True
    device = model_device(model)
    free = free_bytes()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    needed = 2 * 4 * sum(p.numel() for p in model.parameters())
    return 0 < free < needed
