"""A recorded pass in which linear maps and norms are single steps, and why some of them cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from shallower.finding.pointwise import ACTIVATIONS, PRODUCTS, UNCHANGED, is_pointwise
from shallower.modules.forwards import foreign
from shallower.recording.holders import held_elsewhere
from shallower.recording.tracing import Call, Frame, Trace, Value
from shallower.sites import LinearMap

PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(eq=False)
class Unit:
    """A module invocation that is seen as one step: a linear map or a norm.

    Attributes:
        frame: the invocation.
        kind: which of the two.
        source: the value it reads.
        result: the value it gives.
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


class Graph:
    """A recorded pass in which linear maps and norms are single steps.

    Attributes:
        trace: the recorded pass.
        names: all dotted names of each module, the one `named_modules()` gives first.
        holders: the attributes that hold each module, as the modules they are of and their names.
        sharing: the modules that hold each parameter.
        frames: all invocations of each module.
        units, unit_of: the linear maps and norms, by their frame and by each of their calls.
        opaque: for the result of a module that has no linear map and is not pointwise, its frame and what it reads.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.names = names_of(trace.model)
        self.holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in self.names:
            for attribute, child in parent._modules.items():
                if child is not None:
                    self.holders.setdefault(child, []).append((parent, attribute))
        self.held = held_elsewhere(trace.model)
        self.sharing: dict[Value | None, list[nn.Module]] = {}
        for (owner, _), value in trace.weights.items():
            self.sharing.setdefault(value, []).append(owner)
        self.units: dict[Frame, Unit] = {}
        self.unit_of: dict[Call, Unit] = {}
        self.frames: dict[nn.Module, list[Frame]] = {}
        self.opaque: dict[Value, tuple[Frame, Value]] = {}
        self._order = {call: i for i, call in enumerate(trace.calls)}
        self._gather_units()
        self._gather_opaque()

    def position(self, call: Call) -> int:
        """When a call was made, counted in calls."""
        return self._order[call]

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

    def hook_problem(self, module: nn.Module) -> str:
        """Why a module cannot be exchanged: hooks, an instance's own forward."""
        name = self.names[module][0] if module in self.names else type(module).__name__
        return foreign(module, name)

    def module_problem(self, module: nn.Module) -> str:
        """Why a map or norm cannot be exchanged: as `hook_problem`, and it must have one name only."""
        if len(self.holders.get(module, ())) > 1:
            names = self.names[module]
            return f"{names[0]} is held under several names ({', '.join(names[:3])}); keep one of them"
        if any(name.endswith("_orig_mod") for name in self.names[module]):
            return f"{self.names[module][0]} was compiled alone; put the layer itself there, and compile the result"
        if module in self.held:
            return (
                f"{self.names[module][0]} is also in {self.held[module]}, through which a forward may call it; "
                "keep it as an attribute only"
            )
        return self.hook_problem(module)

    def linear_map(self, units: Sequence[Unit]) -> LinearMap:
        """The description of a map, from all its calls that count."""
        module = units[0].module
        d_in, d_out = sizes(module)
        positions = sum(unit.result.elements // d_out for unit in units)
        name = self.names[module][0]
        bias = getattr(module, "bias", None) is not None
        if not isinstance(module, nn.Conv2d):
            kind: Literal["linear", "conv1d"] = "linear" if isinstance(module, nn.Linear) else "conv1d"
            return LinearMap(name, kind, d_in, d_out, bias, positions)
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        if module.padding == "same":
            padding = ((kernel[0] - 1) * dilation[0] // 2, (kernel[1] - 1) * dilation[1] // 2)
        else:
            padding = (0, 0) if isinstance(module.padding, str) else _pair(module.padding)
        images = {unit.source.shape[-2:] for unit in units}
        size = (0, 0) if len(images) > 1 else _pair(images.pop())
        stride, groups = _pair(module.stride), module.groups
        return LinearMap(name, "conv2d", d_in, d_out, bias, positions, kernel, stride, padding, dilation, groups, size)

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
        if isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Conv1d | nn.Conv3d):
            return f"{name} is a {kind}, which is not supported"
        if isinstance(module, nn.Conv2d):
            if (
                type(module).forward is not nn.Conv2d.forward
                or type(module)._conv_forward is not nn.Conv2d._conv_forward
            ):
                return f"{name} is a {kind} with a forward of its own"
            if module.padding == "same" and any(
                (k - 1) * d % 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)
            ):
                return f"{name} pads one side more than the other"
        elif isinstance(module, nn.Linear):
            own = type(module).forward is not nn.Linear.forward
            if own and (len(frame.args) != 1 or frame.kwargs or not self.computes_linear(frame)):
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
            value = self.trace.weights.get((module, attribute))
            others = [self.names[owner][0] for owner in self.sharing.get(value, ()) if owner is not module]
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
        own = [self.trace.weights.get((frame.module, attribute)) for attribute in ("weight", "bias")]
        weight, bias = own
        calls = [call for call in frame.calls() if call.outputs and call.name not in UNCHANGED]
        if len(calls) == 1 and calls[0].name == "linear":
            return calls[0].inputs[1:] == [value for value in own if value is not None]
        if calls and calls[0].name in ("get.T", "t", "transpose") and calls[0].inputs == [weight]:
            turned, rest = calls[0], calls[1:]
            if not rest or rest[0].name != "matmul" or rest[0].inputs[1:] != turned.outputs:
                return False
            if bias is None:
                return len(rest) == 1
            return len(rest) == 2 and rest[1].name == "add" and rest[1].inputs == [*rest[0].outputs, bias]
        return False

    def norm_problem(self, frame: Frame) -> str:
        """Why a norm cannot be folded."""
        module = frame.module
        title = self.title(frame)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"the norm {title} stands in between"
        plain = type(module).forward is nn.modules.batchnorm._BatchNorm.forward and type(module) in BATCH_NORMS
        if not plain and self.norm_call(frame) is None:
            return f"{title} is not a plain BatchNorm"
        if module not in self.names:
            return f"{title} is not part of the model"
        if module.running_mean is None or module.running_var is None:
            return f"{title} has no running statistics, so it depends on the batch"
        if parametrize.is_parametrized(module):
            return f"{title} is parametrized"
        return self.module_problem(module)

    def norm_call(self, frame: Frame) -> Call | None:
        """The call that normalises in a BatchNorm that goes on with children, an activation for instance (timm's)."""
        module = frame.module
        if not isinstance(module, BATCH_NORMS):
            return None
        own = [step for step in frame.steps if isinstance(step, Call) and step.outputs]
        if len(own) != 1 or own[0].name != "batch_norm" or own[0] is not next(c for c in frame.calls() if c.outputs):
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, own[0].args, strict=False)) | dict(own[0].kwargs)
        statistics = [value for value in own[0].inputs if value.owner is module and value.origin == "buffer"]
        weights = [self.trace.weights.get((module, name)) for name in ("weight", "bias")]
        whole = [own[0].inputs[0], *statistics, *(value for value in weights if value is not None)]
        same = own[0].inputs == whole and [value.name for value in statistics] == ["running_mean", "running_var"]
        return own[0] if same and given.get("eps") == module.eps and not given.get("training") else None

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
                norm = self.norm_call(frame)
                if norm is not None:
                    self.units[frame] = Unit(
                        frame, "norm", norm.inputs[0], norm.outputs[0], problem=self.norm_problem(frame)
                    )
                    self.unit_of[norm] = self.units[frame]
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

    def _gather_opaque(self) -> None:
        """Modules without linear maps that make one tensor of one other of the same shape, not pointwise."""
        for frame in self.trace.frames:
            calls = list(frame.calls())
            if len(frame.outputs) != 1 or any(self.is_map(self.step(call)) for call in calls):
                continue
            if all(is_pointwise(call) or not call.outputs for call in calls) or any(
                c.name in ACTIVATIONS for c in calls
            ):
                continue
            made = {value for call in calls for value in call.outputs}
            read = dict.fromkeys(value for call in calls for value in call.inputs if value.fed and value not in made)
            if len(read) == 1 and frame.outputs[0] in made and next(iter(read)).shape == frame.outputs[0].shape:
                self.opaque.setdefault(frame.outputs[0], (frame, next(iter(read))))


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
    own = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
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


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size per dimension."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def channel_dim(step: Step, dims: int) -> int:
    """Which dimension of a map's result holds its channels."""
    return dims - 3 if isinstance(step, Unit) and isinstance(step.module, nn.Conv2d) else dims - 1
