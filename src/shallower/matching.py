"""Find the sites of a model in one recorded forward pass.

From every linear map backwards: through dropouts and BatchNorm to an activation, through it to the linear map (or, in
a gated site, the two) that feeds it. What is found this way either passes every check or is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from shallower.inputs import Inputs
from shallower.rewriting import reason_not_rewritable
from shallower.sites import Kind, LinearMap, Place, Site, Sites
from shallower.tracing import Call, Frame, Trace, Value, trace_forward

NONLINEAR = frozenset(
    "relu relu6 gelu silu tanh sigmoid hardswish hardtanh hardsigmoid leaky_relu elu selu celu mish softplus softsign "
    "logsigmoid tanhshrink softshrink hardshrink threshold rrelu prelu erf erfc exp expm1 clamp clamp_min clamp_max "
    "abs square pow sin cos sinh cosh atan asinh log log1p logaddexp sqrt rsqrt reciprocal maximum minimum where "
    "float_power sign heaviside ge gt le lt round floor ceil trunc tan".split()
)
"""Functions that act on each element by itself and are not affine."""

AFFINE = frozenset("add sub mul div neg positive addcmul addcdiv lerp".split())
"""Functions that act on each element by itself and are affine where all but one argument are constants."""

ACTIVATIONS = frozenset(
    "relu relu6 gelu silu tanh sigmoid hardswish hardtanh hardsigmoid leaky_relu elu selu celu mish softplus softsign "
    "logsigmoid tanhshrink softshrink hardshrink threshold rrelu prelu erf clamp clamp_min".split()
)
"""Functions that make a chain of pointwise calls an activation wherever it stands."""

UNCHANGED = frozenset(
    "contiguous to float half bfloat16 double type type_as clone detach alias get.data lift_fresh requires_grad".split()
)
"""Functions that keep every element where and what it is."""

DROPOUT = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d native_dropout".split()
)
"""Functions that are the identity at inference."""

NORMS = frozenset("layer_norm rms_norm group_norm instance_norm batch_norm local_response_norm normalize".split())

RESHAPES = frozenset(
    "view reshape flatten unflatten permute transpose t squeeze unsqueeze movedim moveaxis swapaxes swapdims "
    "view_as reshape_as expand expand_as repeat get.T get.mT pixel_shuffle pixel_unshuffle channel_shuffle ravel roll "
    "flip getitem select narrow chunk split unbind gather index_select rearrange unfold fold".split()
)

POOLS = frozenset("mean sum amax amin max min interpolate upsample pad".split())

PRODUCTS = frozenset("linear addmm matmul mm bmm einsum baddbmm conv1d conv2d conv3d conv_transpose1d "
                     "conv_transpose2d conv_transpose3d bilinear convolution".split())  # fmt: skip
"""Functions that are linear maps where one argument is a weight."""

MOST_STEPS = 64
"""Pointwise steps that are followed backwards before giving up."""


@dataclass(eq=False)
class Unit:
    """A module invocation that is seen as one step: a linear map or a norm.

    Attributes:
        frame: the invocation.
        kind: which of the two.
        source: the value it reads.
        result: the value it gives.
        weights: the parameters its calls read.
        problem: why it cannot be used, "" if it can.
    """

    frame: Frame
    kind: Literal["map", "norm"]
    source: Value
    result: Value
    problem: str = ""

    @property
    def module(self) -> nn.Module:
        """The module that was called."""
        return self.frame.module


Step = Unit | Call


@dataclass(eq=False)
class Found:
    """One execution of a site, as found by walking backwards.

    Attributes:
        joined: the value at which the activation (or the gate's product) is done.
        chain: the calls that are the activation, in order of execution.
        entry, exit: the value the activation reads and the value it gives.
        producer: the map (the up projection of a gated site), or a call that acts as one.
        gate: the gate's map, where separate.
        packed: which half comes first, where the gate is packed.
        inside: the steps between producer and consumers, consumers excluded.
        values: the values between, which nothing else may read.
        norms_before, norms_after, dropouts: steps met on the way.
        consumers: the maps that read it.
        obstacles: why it cannot be used, first reason first.
    """

    joined: Value
    chain: list[Call]
    entry: Value
    exit: Value
    producer: Step
    gate: Step | None = None
    packed: Literal["", "gate-first", "up-first"] = ""
    inside: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    norms_before: list[Unit] = field(default_factory=list)
    norms_after: list[Unit] = field(default_factory=list)
    dropouts: list[Call] = field(default_factory=list)
    consumers: list[Step] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)


def find_sites(model: nn.Module, example_inputs: Inputs, *, places: bool = False) -> Sites:
    """The sites of `model`, and what looked like one but cannot be used, from one forward pass.

        sites = find_sites(model, {"input_ids": ids, "attention_mask": mask})
        print(sites)

    The model is run once, in eval mode and without gradients, and is left as it was. Models on the meta device or made
    of fake tensors are run without data.

    Args:
        model: any module that runs in eager mode.
        example_inputs: what it is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        places: also list the activations that stand in no site (`kind="activation"`).

    Raises:
        SiteError: `model` is not a module with parameters, or does not run on these inputs.
    """
    trace = trace_forward(model, example_inputs)
    return Matcher(trace).sites(places=places)


class Matcher:
    """The search for sites in one recorded pass."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.names = names_of(trace.model)
        self.units: dict[Frame, Unit] = {}
        self.unit_of: dict[Call, Unit] = {}
        self.frames: dict[nn.Module, list[Frame]] = {}
        self._gather_units()

    # ------------------------------------------------------------------ the graph

    def _gather_units(self) -> None:
        for frame in self.trace.frames:
            self.frames.setdefault(frame.module, []).append(frame)
            if any(outer in self.units for outer in frame.ancestors()):
                continue
            kind = unit_kind(frame.module)
            if not kind:
                continue
            calls = list(frame.calls())
            if kind == "norm" and any(call.name in ACTIVATIONS for call in calls):
                continue
            made = {value for call in calls for value in call.outputs}
            own = set(frame.module.modules())
            read = [
                value
                for call in calls
                for value in call.inputs
                if value not in made and value.origin != "parameter" and value.owner not in own
            ]
            read = list(dict.fromkeys(read))
            if len(frame.outputs) != 1 or not read or frame.outputs[0] not in made:
                continue
            unit = Unit(frame, kind, read[0], frame.outputs[0])
            if len(read) > 1:
                unit.problem = f"{self.title(frame)} reads more than one tensor"
            elif kind == "map":
                unit.problem = self.map_problem(frame)
            else:
                unit.problem = self.norm_problem(frame)
            self.units[frame] = unit
            for call in calls:
                self.unit_of[call] = unit

    def step(self, call: Call) -> Step:
        """The unit that a call belongs to, or the call."""
        return self.unit_of.get(call, call)

    def source(self, value: Value) -> Step | None:
        """The step that made a value."""
        return None if value.call is None else self.step(value.call)

    def readers(self, value: Value) -> list[Step]:
        """The steps that read a value."""
        return list(dict.fromkeys(self.step(call) for call in value.readers))

    def is_map(self, step: Step | None) -> bool:
        """Whether a step is a linear map, usable or not."""
        if isinstance(step, Unit):
            return step.kind == "map"
        return (
            step is not None
            and step.name in PRODUCTS
            and any(value.origin == "parameter" and len(value.shape) > 1 for value in step.inputs)
        )

    def title(self, step: Step | Frame) -> str:
        """A step, for people."""
        if isinstance(step, Unit):
            step = step.frame
        if isinstance(step, Frame):
            return f"{step.name} ({type(step.module).__name__})" if step.name else type(step.module).__name__
        frame = step.frame
        return f"`{step.name}` in {frame.name or type(frame.module).__name__}"

    # ------------------------------------------------------------------ what a map or a norm must be like

    def module_problem(self, module: nn.Module) -> str:
        """Why a module cannot be exchanged or changed: hooks, an instance's own forward."""
        name = self.names[module][0] if module in self.names else type(module).__name__
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, table, None):
                return f"{name} has a {table.strip('_').replace('_', ' ')[:-1]}, which would be lost; remove it first"
        if "forward" in vars(module):
            return f"the forward of {name} has been replaced on the instance"
        return ""

    def map_problem(self, frame: Frame) -> str:
        """Why a linear map cannot be used."""
        module = frame.module
        if module not in self.names:
            return f"{self.title(frame)} is not part of the model"
        name = self.names[module][0]
        kind = type(module).__name__
        if is_adapter(module):
            return f"{name} carries a low-rank adapter ({kind}): call merge_and_unload() first"
        if parametrize.is_parametrized(module):
            return f"{name} has a parametrized weight; call torch.nn.utils.parametrize.remove_parametrizations first"
        if hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            return f"the weight of {name} is computed by a hook (weight_norm, spectral_norm, pruning); remove it first"
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or type(weight) not in PLAIN:
            return f"{name} ({kind}) has no plain floating-point weight (quantised?)"
        if isinstance(module, nn.modules.conv._ConvTransposeNd) or isinstance(module, (nn.Conv1d, nn.Conv3d)):
            return f"{name} is a {kind}, which is not supported"
        if isinstance(module, nn.Conv2d):
            if (
                type(module).forward is not nn.Conv2d.forward
                or type(module)._conv_forward is not nn.Conv2d._conv_forward
            ):
                return f"{name} is a {kind} with a forward of its own"
            if module.groups != 1:
                depthwise = "depthwise" if module.groups == module.in_channels else "grouped"
                return f"{name} is a {depthwise} convolution"
            if module.padding == "same" and any((k - 1) * d % 2 for k, d in zip(module.kernel_size, module.dilation)):
                return f"{name} pads one side more than the other"
        elif isinstance(module, nn.Linear):
            if type(module).forward is not nn.Linear.forward and not self.computes_linear(frame):
                return f"{name} is a {kind} with a forward of its own, not a plain nn.Linear"
        elif not is_transposed(module):
            return f"{name} is a {kind}, not an nn.Linear"
        problem = self.module_problem(module)
        if problem:
            return problem
        for attribute in ("weight", "bias"):
            parameter = getattr(module, attribute, None)
            if parameter is None:
                continue
            value = self.trace.weights.get(id(parameter))
            owners = self.trace.owners.get(id(parameter), [])
            others = [self.names[owner][0] for owner, _ in owners if owner is not module]
            if others:
                return f"the {attribute} of {name} is tied to {others[0] or 'the model itself'}"
            outside = [
                c for c in (value.readers if value else ()) if all(f.module is not module for f in c.frame.ancestors())
            ]
            if outside:
                return f"the {attribute} of {name} is also read by {self.title(outside[0])}"
        return ""

    def computes_linear(self, frame: Frame) -> bool:
        """Whether what ran in a frame is x W^T + b with the module's own weight and bias."""
        own = [self.trace.weights.get(id(p)) for p in (frame.module.weight, getattr(frame.module, "bias", None))]
        weight, bias = own
        calls = [call for call in frame.calls() if call.outputs and call.name not in UNCHANGED]
        if len(calls) == 1 and calls[0].name == "linear":
            return calls[0].inputs[1:] == [value for value in own if value is not None]
        if calls and calls[0].name in ("get.T", "t", "transpose") and calls[0].inputs == [weight]:
            turned, product, *shift = (*calls, *[None] * (2 - len(calls)))
            if product is None or product.name != "matmul" or product.inputs[1:] != turned.outputs:
                return False
            if not shift:
                return bias is None
            return len(shift) == 1 and shift[0].name == "add" and shift[0].inputs == [*product.outputs, bias]
        return False

    def norm_problem(self, frame: Frame) -> str:
        """Why a norm cannot be folded."""
        module = frame.module
        title = self.title(frame)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"the norm {title} stands in between"
        if type(module).forward is not nn.modules.batchnorm._BatchNorm.forward or type(module) not in BATCH_NORMS:
            return f"{title} is not a plain BatchNorm"
        if module not in self.names:
            return f"{title} is not part of the model"
        if module.running_mean is None or module.running_var is None:
            return f"{title} has no running statistics, so it depends on the batch"
        if parametrize.is_parametrized(module):
            return f"{title} is parametrized"
        return self.module_problem(module)

    # ------------------------------------------------------------------ walking backwards

    def back(self, value: Value) -> tuple[Value, list[Step], list[str]]:
        """Back through what changes nothing, BatchNorm, and (as obstacles) other norms, reshapes and pooling.

        Returns the value reached, the steps passed (latest first) and the obstacles among them.
        """
        passed: list[Step] = []
        obstacles: list[str] = []
        while len(passed) < MOST_STEPS:
            step = self.source(value)
            if isinstance(step, Unit) and step.kind == "norm":
                if step.problem:
                    obstacles.append(step.problem)
                passed.append(step)
                value = step.source
            elif isinstance(step, Call) and step.name in UNCHANGED | DROPOUT and step.inputs:
                passed.append(step)
                value = step.inputs[0]
            elif isinstance(step, Call) and (what := obstacle(step)):
                obstacles.append(f"{what} {self.title(step)} stands in between")
                passed.append(step)
                value = step.inputs[0]
            else:
                return value, passed, obstacles
            if len(obstacles) > 3:
                break
        return value, passed, obstacles

    def cone(self, value: Value) -> tuple[list[Call], list[Value], list[Value]]:
        """Pointwise calls that `value` is made by, in order of execution; the values they start from; all between."""
        calls: list[Call] = []
        leaves: list[Value] = []
        between: list[Value] = []
        waiting = [value]
        seen: set[Value] = set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            step = self.source(current)
            if isinstance(step, Call) and is_pointwise(step) and len(calls) < MOST_STEPS:
                between.append(current)
                if step not in calls:
                    calls.append(step)
                waiting += moving(step)
            else:
                leaves.append(current)
        calls.sort(key=self._position)
        return calls, leaves, between

    def _position(self, call: Call) -> int:
        if not hasattr(self, "_positions"):
            self._positions = {made: i for i, made in enumerate(self.trace.calls)}
        return self._positions[call]

    def candidate(self, consumer: Step, read: Value) -> Found | None:
        """What a linear map's input looks like going back: a site, usable or not, or None."""
        joined, after, obstacles = self.back(read)
        mixed: list[Value] = []
        for _ in range(3):
            calls, leaves, between = self.cone(joined)
            if not calls:
                top = self.source(joined)
                if isinstance(top, Call) and top.name == "glu":
                    return self.one_function_gate(joined, top, after, obstacles, consumer)
                return None
            live = [leaf for leaf in leaves if leaf.dynamic]
            still = [leaf for leaf in leaves if not leaf.dynamic]
            if still and live:
                obstacles.append(f"a tensor with more than one element ({describe(still[0])}) is mixed in")
            if len(live) == 1:
                found = self.plain(joined, calls, between, live[0], obstacles)
                break
            top = self.source(joined)
            if len(live) < 2 or not isinstance(top, Call):
                return None
            gated = self.gated(joined, top, obstacles)
            if gated is not None:
                found = gated
                break
            # Something else is multiplied in or mixed in after the activation: go on along the side that has one.
            sides = [side for side in moving(top) if is_nonlinear(self.cone(self.back(side)[0])[0])]
            others = [side for side in moving(top) if side not in sides]
            if len(sides) != 1 or not others or (top.name in ("add", "sub") and others[0].origin == "computed"):
                return None
            obstacles.append(f"another tensor ({describe(others[0])}) is mixed in by {self.title(top)}")
            joined, more, met = self.back(sides[0])
            after += [top, *more]
            obstacles += met
            mixed.append(sides[0])
        else:
            return None
        if found is None:
            return None
        found.inside += after
        found.values += [read, *mixed]
        for step in after:
            found.values += [step.source] if isinstance(step, Unit) else moving(step)
            if isinstance(step, Unit) and not step.problem:
                found.norms_after.append(step)
            if isinstance(step, Call) and step.name in DROPOUT:
                found.dropouts.append(step)
        found.consumers.append(consumer)
        return found

    def plain(
        self, joined: Value, calls: list[Call], between: list[Value], leaf: Value, obstacles: list[str]
    ) -> Found | None:
        """An activation with one input."""
        if not is_nonlinear(calls):
            return None
        start, before, met = self.back(leaf)
        producer = self.source(start)
        if producer is None or not self.is_map(producer):
            return None
        chain, entry, trimmed = self.trimmed(calls, leaf)
        found = Found(joined, chain, entry, joined, producer, obstacles=obstacles + met)
        self._collect(found, chain, [*between, leaf], [*trimmed, *before], start)
        return found

    def trimmed(self, calls: list[Call], leaf: Value) -> tuple[list[Call], Value, list[Step]]:
        """A chain without the calls at its beginning that change nothing, the value it then starts from, and those."""
        chain, passed = list(calls), []
        while chain[0].name in UNCHANGED | DROPOUT and not any(leaf in call.inputs for call in chain[1:]):
            leaf = chain[0].outputs[0]
            passed.append(chain.pop(0))
        return chain, leaf, list(passed)

    def _collect(
        self, found: Found, calls: Sequence[Call], values: Iterable[Value], before: list[Step], start: Value
    ) -> None:
        found.inside += [*calls, *before]
        found.values += [*values, start]
        for step in before:
            found.values += [step.source] if isinstance(step, Unit) else moving(step)
            if isinstance(step, Unit) and not step.problem:
                found.norms_before.append(step)
            if isinstance(step, Call) and step.name in DROPOUT:
                found.dropouts.append(step)
        found.dropouts += [call for call in calls if call.name in DROPOUT]

    def gated(self, joined: Value, top: Call, obstacles: list[str]) -> Found | None:
        """f(G x) * (U x), with two maps or with one whose result is split."""
        factors = moving(top)
        if top.name != "mul" or len(factors) != 2:
            return None
        cones = [self.cone(factor) for factor in factors]
        active = [is_nonlinear(calls) for calls, _, _ in cones]
        if sum(active) == 0 or any(len([leaf for leaf in leaves if leaf.dynamic]) != 1 for _, leaves, _ in cones):
            return None
        f, other = (0, 1) if active[0] else (1, 0)
        chain, f_leaves, f_between = cones[f]
        steps, u_leaves, u_between = cones[other]
        gate_leaf = next(leaf for leaf in f_leaves if leaf.dynamic)
        up_leaf = next(leaf for leaf in u_leaves if leaf.dynamic)
        met: list[str] = []
        if all(active):
            met.append("both factors of the product are activated")
        elif any(call.name not in UNCHANGED for call in steps):
            met.append("the factor without activation is scaled or shifted")
        chain, entry, trimmed = self.trimmed(chain, gate_leaf)
        steps = [*steps, *(step for step in trimmed if isinstance(step, Call))]
        found = self._packed(joined, chain, gate_leaf, up_leaf, obstacles + met, factors[f])
        if found is None:
            gate_start, gate_before, gate_met = self.back(gate_leaf)
            up_start, up_before, up_met = self.back(up_leaf)
            gate, up = self.source(gate_start), self.source(up_start)
            if gate is None or up is None or not (self.is_map(gate) and self.is_map(up)):
                return None
            if factors[0].shape != factors[1].shape:
                return None
            found = Found(
                joined, chain, gate_leaf, factors[f], up, gate=gate, obstacles=obstacles + met + gate_met + up_met
            )
            if isinstance(gate, Unit) and isinstance(up, Unit) and gate.source is not up.source:
                found.obstacles.append("the gate and the up projection read different tensors")
            self._collect(found, [], [gate_leaf], gate_before, gate_start)
            self._collect(found, [], [up_leaf], up_before, up_start)
        found.entry = entry
        found.dropouts += [call for call in (*chain, *steps) if call.name in DROPOUT]
        if found.norms_before:
            found.obstacles.append(f"a norm ({self.title(found.norms_before[0])}) stands before the gate's product")
        found.inside += [top, *chain, *steps]
        found.values += [joined, *factors, *f_between, *u_between]
        return found

    def _packed(
        self, joined: Value, chain: list[Call], gate: Value, up: Value, obstacles: list[str], exit: Value
    ) -> Found | None:
        gate_half, up_half = half(gate), half(up)
        if gate_half is None or up_half is None or gate_half[0] is not up_half[0]:
            return None
        base, gate_index, dim = gate_half
        _, up_index, up_dim = up_half
        start, before, met = self.back(base)
        producer = self.source(start)
        if producer is None or not self.is_map(producer):
            return None
        found = Found(joined, chain, gate, exit, producer, obstacles=obstacles + met)
        found.packed = "gate-first" if gate_index == 0 else "up-first"
        if {gate_index, up_index} != {0, 1} or dim != up_dim:
            found.obstacles.append("the gate and the up projection are interleaved in one tensor")
        elif dim not in ("any", channel_dim(producer, len(base.shape))):
            found.obstacles.append("the hidden tensor is split along another dimension than its channels")
        self._collect(found, [], [base, gate, up], before, start)
        found.inside += [step for value in (gate, up) if (step := self.source(value)) is not None]
        return found

    def one_function_gate(
        self, joined: Value, top: Call, after: list[Step], obstacles: list[str], consumer: Step
    ) -> Found | None:
        """F.glu: sigmoid and product in one function."""
        start, _, _ = self.back(top.inputs[0])
        producer = self.source(start)
        if producer is None or not self.is_map(producer):
            return None
        found = Found(joined, [top], start, joined, producer, inside=[top, *after], consumers=[consumer])
        found.obstacles = ["gate and product are one function (glu)", *obstacles]
        return found

    # ------------------------------------------------------------------ all sites

    def candidates(self) -> list[Found]:
        """All candidates, those with several consumers joined, in order of execution."""
        by_value: dict[Value, Found] = {}
        for call in self.trace.calls:
            step = self.step(call)
            if not self.is_map(step):
                continue
            if isinstance(step, Unit):
                if call is not next(step.frame.calls()):
                    continue
                read = [step.source]
            else:
                read = [value for value in step.inputs if value.dynamic]
            for value in read[:1]:
                found = self.candidate(step, value)
                if found is None:
                    continue
                known = by_value.get(found.joined)
                if known is None:
                    by_value[found.joined] = found
                    continue
                if known.norms_after != found.norms_after:
                    known.obstacles.append("its consumers read it through different norms")
                known.consumers += found.consumers
                known.values += found.values
                known.inside += found.inside
                known.dropouts += [d for d in found.dropouts if d not in known.dropouts]
                known.obstacles += [o for o in found.obstacles if o not in known.obstacles]
        order = {id(found): self._position(found.joined.call) for found in by_value.values() if found.joined.call}
        return sorted(by_value.values(), key=lambda found: order[id(found)])

    def obstacle_of(self, found: Found) -> str:
        """Why a candidate cannot be used, looking at this one execution; "" if it can."""
        maps = [found.producer, *([found.gate] if found.gate else []), *found.consumers]
        for step in maps:
            if isinstance(step, Call):
                weight = next(value for value in step.inputs if value.origin == "parameter")
                return f"the weight {weight.name} is used by {self.title(step)}, not by calling its module"
        units = [step for step in maps if isinstance(step, Unit)]
        for unit in units:
            if unit.problem:
                return unit.problem
        if found.obstacles:
            return found.obstacles[0]
        if len(found.norms_before) > 1 or len(found.norms_after) > 1:
            return "there is more than one norm on one side of the activation"
        inside = set(found.inside) | set(found.consumers)
        for value in dict.fromkeys(found.values):
            if value.output:
                return "the hidden tensor is an output of the model"
            if value.clobbered:
                return "the hidden tensor is written in place through a view of it"
            for reader in self.readers(value):
                if reader not in inside:
                    return f"the hidden tensor is also read by {self.title(reader)}"
        producer, consumers = units[0], units[1 + bool(found.gate) :]
        if len({isinstance(unit.module, nn.Conv2d) for unit in units}) > 1:
            return "a convolution and a linear layer act on different dimensions"
        width = sizes(producer.module)[1] // (2 if found.packed else 1)
        if found.gate is not None and sizes(units[1].module)[1] != width:
            return "the gate and the up projection have different widths"
        for consumer in consumers:
            if sizes(consumer.module)[0] != width:
                return f"{consumer.frame.name} reads {sizes(consumer.module)[0]} features of a hidden tensor with {width} channels"
        shape = found.joined.shape
        if any(value.shape != shape for value in (found.entry, found.exit)):
            return "the activation changes the shape of the hidden tensor"
        for norm in (*found.norms_before, *found.norms_after):
            dim = 1 if len(norm.source.shape) > 1 else 0
            if dim != channel_dim(producer, len(norm.source.shape)):
                return f"the norm {self.title(norm)} acts on another dimension than the channels"
        return ""

    def place_of(self, found: Sequence[Found]) -> tuple[Place | None, str]:
        """Where the activation of a site stands, from all its executions; or why it cannot be exchanged."""
        chains = [set(item.chain) for item in found]
        frames = [self.frame_of(chain) for chain in chains]
        owners = [self.exact_frame(chain, frame) for chain, frame in zip(chains, frames, strict=True)]
        exact = [frame for frame in owners if frame is not None]
        if len(exact) == len(found):
            problem = self.module_problem(exact[0].module)
            if problem:
                return None, problem
            # PyTorch's fused encoder path passes the activation by: externalising it switches that path off.
            fused = any(isinstance(f.parent.module, nn.TransformerEncoderLayer) for f in exact if f.parent)
            place, problem = (None, "") if fused else self.module_place(exact)
            if place is not None or problem:
                return place, problem
        places = set()
        reasons = []
        for chain, frame, owner in zip(chains, frames, owners, strict=True):
            outer = owner.parent if owner is not None else frame
            place, problem = self.call_place(chain, outer)
            places.add(place)
            reasons.append(problem)
        if any(reasons):
            return None, next(reason for reason in reasons if reason)
        if len(places) != 1:
            return None, "its activation stands at different places in different calls"
        return places.pop(), ""

    def frame_of(self, chain: set[Call]) -> Frame:
        """The innermost frame that holds all calls of a chain."""
        first, *others = chain
        for frame in first.frame.ancestors():
            if all(frame in other.frame.ancestors() for other in others):
                return frame
        return self.trace.root

    def exact_frame(self, chain: set[Call], frame: Frame) -> Frame | None:
        """`frame` if it does what the chain does and nothing else."""
        extra = [call for call in frame.calls() if call not in chain and call.outputs and call.name not in UNCHANGED]
        return frame if not extra and frame.module in self.names else None

    def module_place(self, exact: Sequence[Frame]) -> tuple[Place | None, str]:
        """The activation as a module that can be exchanged by its name; None where it is called elsewhere too."""
        module = exact[0].module
        if any(frame.module is not module for frame in exact):
            return None, "different activation modules are used in different calls"
        if len(self.frames[module]) == len(exact) and len(self.names[module]) == 1:
            return Place(self.names[module][0]), ""
        # A shared object. It can still be exchanged where each user reaches it by an attribute of its own.
        paths = {self.path_of(frame) for frame in exact}
        if len(paths) != 1:
            return None, ""
        path = paths.pop()
        elsewhere = [frame for frame in self.frames[module] if frame not in exact]
        if not path or any(self.path_of(frame) in ("", path) for frame in elsewhere):
            return None, ""
        return Place(path), ""

    def path_of(self, frame: Frame) -> str:
        """The dotted name by which a frame's caller reached its module, "" where that is not certain."""
        parent = frame.parent
        if parent is None or parent.name is None:
            return ""
        children = [name for name, child in parent.module._modules.items() if child is frame.module]
        prefix = parent.name + "." if parent.name else ""
        if type(parent.module).forward is nn.Sequential.forward:
            steps = [step for step in parent.steps if isinstance(step, Frame)]
            slots = list(parent.module._modules)
            return prefix + slots[steps.index(frame)] if len(steps) == len(slots) else ""
        if len(children) != 1 or len(self.names[parent.module]) != 1:
            return ""
        return prefix + children[0]

    def call_place(self, chain: set[Call], frame: Frame | None) -> tuple[Place | None, str]:
        """The activation as calls of the enclosing module's own forward."""
        if frame is None or frame.name is None:
            return None, "its activation is called outside of the model's modules"
        calls: list[tuple[str, int]] = []
        for step in frame.steps:
            if isinstance(step, Call):
                if step in chain:
                    calls.append((step.name, step.ordinal))
                continue
            inner = set(step.calls())
            if inner & chain:
                if not {call for call in inner if call.outputs} <= chain:
                    return None, f"its activation is only a part of {self.title(step)}"
                name = relative_name(frame.module, step.module)
                if name is None:
                    return None, f"its activation is called in {self.title(step)}, which {frame.name} does not own"
                calls.append(("self." + name, step.ordinal))
        place = Place(frame.name, tuple(calls))
        reason = reason_not_rewritable(self.trace.model, place, frame)
        return (None, reason) if reason else (place, "")

    def dropout_place(self, call: Call) -> Place | None:
        """Where a dropout stands, if it can be exchanged there."""
        frame = self.exact_frame({call}, call.frame)
        if frame is not None:
            if self.module_problem(frame.module):
                return None
            if len(self.frames[frame.module]) == 1 and len(self.names[frame.module]) == 1:
                return Place(self.names[frame.module][0])
            path = self.path_of(frame)
            same = [other for other in self.frames[frame.module] if self.path_of(other) in ("", path)]
            if path and same == [frame]:
                return Place(path)
            return self.call_place({call}, frame.parent)[0]
        return self.call_place({call}, call.frame)[0]

    def linear_map(self, units: Sequence[Unit]) -> LinearMap:
        """The description of a map, from all its calls in the site."""
        module = units[0].module
        d_in, d_out = sizes(module)
        positions = sum(unit.result.elements // d_out for unit in units)
        name = self.names[module][0]
        bias = getattr(module, "bias", None) is not None
        if not isinstance(module, nn.Conv2d):
            kind: Literal["linear", "conv1d"] = "linear" if isinstance(module, nn.Linear) else "conv1d"
            return LinearMap(name, kind, d_in, d_out, bias, positions)
        kernel, dilation = pair(module.kernel_size), pair(module.dilation)
        if module.padding == "same":
            padding = ((kernel[0] - 1) * dilation[0] // 2, (kernel[1] - 1) * dilation[1] // 2)
        else:
            padding = (0, 0) if isinstance(module.padding, str) else pair(module.padding)
        return LinearMap(
            name, "conv2d", d_in, d_out, bias, positions, kernel, pair(module.stride), padding, dilation, module.groups
        )

    def sites(self, *, places: bool) -> Sites:
        """All sites and what was skipped."""
        usable: dict[tuple[nn.Module, ...], list[Found]] = {}
        refused: list[tuple[Found, str]] = []
        for found in self.candidates():
            reason = self.obstacle_of(found)
            if reason:
                refused.append((found, reason))
            else:
                usable.setdefault(self.signature(found), []).append(found)
        chosen: list[tuple[list[Found], Place]] = []
        for group in usable.values():
            reason = self.shared_reason(group)
            place: Place | None = None
            if not reason:
                place, reason = self.place_of(group)
            if place is None or reason:
                refused.append((group[0], reason))
                continue
            chosen.append((group, place))
        heads = self.heads([group for group, _ in chosen])
        built = [(group, self.build(group, place, i in heads)) for i, (group, place) in enumerate(chosen)]
        order = {call: i for i, call in enumerate(self.trace.calls)}
        refused.sort(key=lambda item: order[item[0].chain[0]])
        items, skipped = self.named(built, refused)
        if places:
            covered = {call for group, _ in built for found in group for call in found.chain}
            items += self.places(covered, skipped)
            items.sort(key=lambda item: item[0])
        model = self.trace.model
        return Sites(
            items=tuple(site for _, site in items),
            skipped=skipped,
            params=sum(parameter.numel() for parameter in model.parameters()),
            macs=self.trace.macs,
        )

    def signature(self, found: Found) -> tuple[nn.Module, ...]:
        """The modules of a site; executions with the same ones are calls of one site."""
        units = [found.gate, found.producer, *found.norms_before, *found.norms_after, *found.consumers]
        return tuple(unit.module for unit in units if isinstance(unit, Unit))

    def shared_reason(self, group: Sequence[Found]) -> str:
        """Why a site cannot be used because of calls of its modules elsewhere in the model."""
        for role in ("makes", "reads"):
            held: dict[nn.Module, set[Frame]] = {}
            for found in group:
                steps = (
                    [found.producer, found.gate, *found.norms_before]
                    if role == "makes"
                    else found.consumers + found.norms_after
                )
                for unit in steps:
                    if isinstance(unit, Unit):
                        held.setdefault(unit.module, set()).add(unit.frame)
            for module, frames in held.items():
                elsewhere = [frame for frame in self.frames[module] if frame not in frames]
                if elsewhere:
                    caller = elsewhere[0].parent
                    where = f" by {caller.name or type(caller.module).__name__}" if caller is not None else ""
                    return f"{self.names[module][0]} is also called{where} outside of this site"
        return ""

    def build(self, group: Sequence[Found], place: Place, head: bool) -> Site:
        """The site that a group of executions is."""
        first = group[0]
        producer = self.linear_map([found.producer for found in group if isinstance(found.producer, Unit)])
        gate = None
        if first.gate is not None:
            gate = self.linear_map([found.gate for found in group if isinstance(found.gate, Unit)])
        modules = list(dict.fromkeys(unit.module for unit in first.consumers if isinstance(unit, Unit)))
        consumers = tuple(
            self.linear_map(
                [c for found in group for c in found.consumers if isinstance(c, Unit) and c.module is module]
            )
            for module in modules
        )
        dropouts = dict.fromkeys(self.dropout_place(call) for found in group for call in found.dropouts)
        return Site(
            name="",
            kind=self.kind(first, producer, gate, consumers, head),
            width=producer.d_out // (2 if first.packed else 1),
            producer=producer,
            consumers=consumers,
            activation=place,
            activation_name=activation_name(
                first.chain, self.exact_frame(set(first.chain), self.frame_of(set(first.chain)))
            ),
            gate=gate,
            packed=first.packed,
            norm_before=self.names[first.norms_before[0].module][0] if first.norms_before else "",
            norm_after=self.names[first.norms_after[0].module][0] if first.norms_after else "",
            dropouts=tuple(place for place in dropouts if place is not None),
            calls=len(group),
            channels_first=producer.kind == "conv2d",
            not_linear=self.not_linear(first, producer, consumers),
        )

    def kind(
        self, first: Found, producer: LinearMap, gate: LinearMap | None, consumers: Sequence[LinearMap], head: bool
    ) -> Kind:
        """What the site is in the network, from the structure around it."""
        if gate is not None or first.packed:
            return "gated"
        if isinstance(first.producer, Unit) and not first.producer.source.fed:
            return "position MLP"
        maps = (producer, *consumers)
        plain = all(m.taps == 1 and m.stride == (1, 1) and m.padding == (0, 0) for m in maps)
        widening = producer.d_out > max(producer.d_in, *(c.d_out for c in consumers))
        if producer.kind == "conv2d" and not (plain and widening):
            return "convolution"
        return "head" if head else "feed-forward"

    def heads(self, groups: Sequence[Sequence[Found]]) -> set[int]:
        """Which groups are heads: in no residual, and no maps but heads behind them."""
        followed: set[Value] = set()
        for call in reversed(self.trace.calls):
            if self.is_map(self.step(call)) or any(value in followed for value in call.outputs):
                followed.update(call.inputs)
        by_producer = {group[0].producer: i for i, group in enumerate(groups)}
        last: set[int] = set()
        for i in reversed(range(len(groups))):
            results = [unit.result for found in groups[i] for unit in found.consumers if isinstance(unit, Unit)]
            if any(self.joins_residual(value) for value in results):
                continue
            next_sites = [by_producer.get(consumer) for consumer in groups[i][0].consumers]
            if not any(value in followed for value in results) or (next_sites and all(n in last for n in next_sites)):
                last.add(i)
        return last

    def joins_residual(self, value: Value) -> bool:
        """Whether a value is soon added to another tensor that depends on the inputs."""
        waiting, seen = [(value, 0)], {value}
        while waiting:
            current, depth = waiting.pop()
            for reader in self.readers(current):
                if isinstance(reader, Unit):
                    onward = [reader.result] if reader.kind == "norm" else []
                elif reader.name in ("add", "sub") and len([v for v in reader.inputs if v.fed and v.elements > 1]) > 1:
                    return True
                elif reader.name in UNCHANGED | DROPOUT | AFFINE or obstacle(reader):
                    onward = reader.outputs
                else:
                    onward = []
                if depth < 8:
                    waiting += [(v, depth + 1) for v in onward if v not in seen]
                    seen.update(onward)
        return False

    def not_linear(self, found: Found, producer: LinearMap, consumers: Sequence[LinearMap]) -> str:
        """Why no channel may become linear, "" if it may."""
        if producer.kind != "conv2d":
            return ""
        for unit in (found.producer, *found.consumers):
            if isinstance(unit, Unit) and isinstance(unit.module, nn.Conv2d) and unit.module.padding_mode != "zeros":
                return f"{unit.frame.name} pads with {unit.module.padding_mode}, not zeros"
        for consumer in consumers:
            if consumer.padding != (0, 0):
                return f"{consumer.name} pads with zeros, so the merged convolution would differ along the border"
            if consumer.taps > 1 and producer.taps > 1:
                return f"merging with {consumer.name} would make a larger kernel"
            if consumer.taps > 1 and (producer.stride != (1, 1) or producer.padding != (0, 0)):
                return f"{producer.name} strides or pads before {consumer.name}, which has a kernel larger than 1x1"
        return ""

    def named(
        self, built: list[tuple[list[Found], Site]], refused: list[tuple[Found, str]]
    ) -> tuple[list[tuple[int, Site]], dict[str, str]]:
        """The sites with their names and their position in the execution, and the skipped ones by name."""
        prefixes = [self.prefix(found[0]) for found, _ in built] + [self.prefix(found) for found, _ in refused]
        items = []
        taken: set[str] = set()
        order = {call: i for i, call in enumerate(self.trace.calls)}
        for (found, site), prefix in zip(built, prefixes, strict=False):
            name = prefix if prefix and prefixes.count(prefix) == 1 else site.maps[-len(site.consumers) - 1].name
            taken.add(name)
            items.append((order[found[0].chain[0]], replace(site, name=name)))
        skipped: dict[str, str] = {}
        for (found, reason), prefix in zip(refused, prefixes[len(built) :], strict=True):
            name = prefix if prefix and prefixes.count(prefix) == 1 else self.step_name(found.producer)
            if name not in taken:
                skipped.setdefault(name, reason)
        items.sort(key=lambda item: item[0])
        return items, skipped

    def places(self, covered: set[Call], skipped: dict[str, str]) -> list[tuple[int, Site]]:
        """The activations that stand in no site, with their position; those that cannot be exchanged are skipped."""
        groups: dict[Any, list[Found]] = {}
        for chain, entry, top in self.activations():
            if covered & set(chain):
                continue
            frame = self.frame_of(set(chain))
            key = (frame.module, tuple((c.name, c.ordinal, c.frame.module, c.frame.ordinal) for c in chain))
            dummy = chain[0]
            groups.setdefault(key, []).append(Found(top, chain, entry, top, dummy))
        items = []
        for group in groups.values():
            first = group[0]
            place, reason = self.place_of(group)
            owner = self.exact_frame(set(first.chain), self.frame_of(set(first.chain)))
            if place is None:
                frame = self.frame_of(set(first.chain))
                skipped.setdefault(f"{frame.name or 'model'}:{first.chain[0].name}#{first.chain[0].ordinal}", reason)
                continue
            site = Site(
                name=str(place),
                kind="activation",
                width=0,
                producer=None,
                consumers=(),
                activation=place,
                activation_name=activation_name(first.chain, owner),
                calls=len(group),
                channels_first=self.is_spatial(first.entry),
            )
            items.append((self._position(first.chain[0]), site))
        return items

    def activations(self) -> Iterator[tuple[list[Call], Value, Value]]:
        """Every activation: its calls, the value it reads and the value it gives."""
        roots: dict[Value, Value] = {}
        for call in self.trace.calls:
            if call in self.unit_of or not is_pointwise(call):
                continue
            found = {roots.get(value, value) for value in moving(call)}
            if len(found) == 1:
                roots[call.outputs[0]] = found.pop()
        ends = {
            value
            for value, root in roots.items()
            if any(roots.get(o) is not root for reader in value.readers for o in reader.outputs or [value])
            or not value.readers
        }
        for end in sorted(ends, key=lambda value: self._position(value.call) if value.call else 0):
            chain: list[Call] = []
            entries: set[Value] = set()
            waiting = [end]
            while waiting:
                value = waiting.pop()
                if value.call is None or (value is not end and value in ends) or value not in roots:
                    entries.add(value)
                elif value.call not in chain:
                    chain.append(value.call)
                    waiting += moving(value.call)
            chain.sort(key=self._position)
            if len(entries) != 1 or not any(call.name in ACTIVATIONS for call in chain):
                continue
            entry = entries.pop()
            chain, entry, _ = self.trimmed(chain, entry)
            while chain[-1].name in UNCHANGED | DROPOUT:
                chain.pop()
            gates = any(r.name in ("mul", "glu") and len(moving(r)) > 1 for r in end.readers)
            if entry.fed and entry.elements > 1 and not gates:
                yield chain, entry, chain[-1].outputs[0]

    def is_spatial(self, value: Value) -> bool:
        """Whether a value has its channels in dimension 1, as convolutions make it."""
        waiting, seen = [value], {value}
        while waiting and len(seen) < MOST_STEPS:
            current = waiting.pop(0)
            step = self.source(current)
            if isinstance(step, Unit) and step.kind == "map":
                return isinstance(step.module, nn.modules.conv._ConvNd)
            onward = [step.source] if isinstance(step, Unit) else step.inputs if step is not None else []
            waiting += [v for v in onward if v not in seen and v.fed]
            seen.update(onward)
        return False

    def step_name(self, step: Step) -> str:
        """A name for a producer, whatever it is."""
        if isinstance(step, Unit):
            return step.frame.name or type(step.module).__name__
        weight = next((value.name for value in step.inputs if value.origin == "parameter" and len(value.shape) > 1), "")
        return weight.rsplit(".", 1)[0] if "." in weight else weight or step.name

    def prefix(self, found: Found) -> str:
        """The common dotted prefix of a site's maps."""
        steps = [step for step in (found.gate, found.producer, *found.consumers) if step is not None]
        return common_prefix([self.step_name(step) for step in steps])


PLAIN = (nn.Parameter, torch.Tensor)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All dotted names of each module, the one `named_modules()` gives first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def unit_kind(module: nn.Module) -> Literal["map", "norm", ""]:
    """Whether a module is to be seen as one linear map, one norm, or through."""
    if (
        is_adapter(module)
        or isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
        or is_transposed(module)
    ):
        return "map"
    children = list(module.modules())[1:]
    if (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not children
    ):
        return "map"
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
        return "norm"
    if "norm" in type(module).__name__.lower() and all(not unit_kind(child) for child in children):
        return "norm"
    return ""


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is Transformers' Conv1D: a linear layer whose weight is (d_in, d_out)."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(module).__mro__[:1]
    )


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear layer that carries a low-rank adapter."""
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return True
    own = [*module._modules, *module._parameters]
    return any(name.lower().startswith("lora") for name in own)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a linear map."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0], weight.shape[1]


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size per dimension."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def channel_dim(step: Step, dims: int) -> int:
    """Which dimension of a map's result holds its channels."""
    return dims - 3 if isinstance(step, Unit) and isinstance(step.module, nn.Conv2d) else dims - 1


def moving(call: Call) -> list[Value]:
    """The inputs of a pointwise call that are not constants: more than one element, or depending on the model's inputs."""
    inputs = call.inputs[:1] if call.name == "prelu" else call.inputs
    return [value for value in inputs if value.elements > 1 or value.fed]


def is_pointwise(call: Call) -> bool:
    """Whether each element of the result depends on the same element of the inputs only."""
    if call.name in UNCHANGED or call.name in DROPOUT:
        return len(call.inputs) >= 1
    if call.name in ("max", "min"):
        return False
    return (call.name in NONLINEAR or call.name in AFFINE) and len(call.outputs) == 1 and bool(moving(call))


def is_nonlinear(calls: Iterable[Call]) -> bool:
    """Whether a chain of pointwise calls is an activation, not just a scale and a shift."""
    return any(call.name in NONLINEAR or (call.name == "mul" and len(moving(call)) > 1) for call in calls) or any(
        call.name == "mul" and call.inputs and len(call.inputs) == 1 and not _has_number(call) for call in calls
    )


def _has_number(call: Call) -> bool:
    return any(isinstance(item, (int, float)) for item in (*call.args, *call.kwargs.values()))


def obstacle(call: Call) -> str:
    """What a call that may stand between activation and map is, in words; "" where it is none of these."""
    moved = [value for value in call.inputs if value.elements > 1]
    if (
        len(moved) < 1
        or any(value.dynamic for value in moved[1:])
        or not moved[0].dynamic
        or call.inputs[0] is not moved[0]
    ):
        return ""
    if call.name in NORMS:
        return "the norm"
    if "pool" in call.name or call.name in POOLS:
        return "the pooling"
    if call.name in RESHAPES:
        return "the reshape"
    return ""


def half(value: Value) -> tuple[Value, int, int | str] | None:
    """The tensor that a value is one half of, which half, and along which dimension; index -1 where not contiguous."""
    call = value.call
    while call is not None and call.name in UNCHANGED:
        value = call.inputs[0]
        call = value.call
    if call is None or not call.inputs:
        return None
    base = call.inputs[0]
    dims = len(base.shape)
    changed = [i for i in range(dims) if len(value.shape) == dims and value.shape[i] != base.shape[i]]
    if len(changed) != 1 or value.shape[changed[0]] * 2 != base.shape[changed[0]]:
        return None
    dim = changed[0]
    if call.name in ("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "split_with_sizes"):
        return (base, call.outputs.index(value), dim) if len(call.outputs) == 2 else None
    if call.name == "getitem":
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        part = index[dim - dims] if any(item is Ellipsis for item in index) else index[dim]
        if not isinstance(part, slice):
            return None
        start, _, step = part.indices(base.shape[dim])
        if step != 1:
            return base, -1, dim
        return (base, 0 if start == 0 else 1, dim) if start in (0, value.shape[dim]) else None
    if call.name == "narrow":
        start = call.args[2] if len(call.args) > 2 else call.kwargs.get("start", 0)
        return base, 0 if start == 0 else 1, dim
    return None


def describe(value: Value) -> str:
    """A value, for people."""
    if value.name:
        return f"the {value.origin} {value.name}"
    shape = "x".join(str(size) for size in value.shape)
    if value.call is not None:
        return f"the {shape} result of `{value.call.name}`"
    return f"an {value.origin} tensor of shape {shape}"


def relative_name(owner: nn.Module, module: nn.Module) -> str | None:
    """The dotted name of a module below another, None where it is not there."""
    return next((name for name, child in owner.named_modules() if child is module and name), None)


def common_prefix(names: Sequence[str]) -> str:
    """The common leading components of dotted names, at most all but the last of each."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def activation_name(chain: Sequence[Call], frame: Frame | None) -> str:
    """What an activation is, for people: "gelu", "relu", "silu"."""
    names = [call.name for call in chain if call.name not in UNCHANGED and call.name not in DROPOUT]
    if len(names) == 1:
        return names[0]
    if "erf" in names or ("tanh" in names and ("pow" in names or len(names) > 4)):
        return "gelu"
    if sorted(names) in (["mul", "sigmoid"], ["div", "add", "exp"]):
        return "silu"
    if sorted(names) == ["mul", "mul", "sigmoid"]:
        return "quick gelu"
    if names[:1] == ["relu"] and names[1:] in (["square"], ["pow"], ["mul"]):
        return "squared relu"
    if names == ["softplus", "tanh", "mul"]:
        return "mish"
    return type(frame.module).__name__.lower() if frame is not None and frame.name else names[0]
