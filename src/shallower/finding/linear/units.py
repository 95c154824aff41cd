"""A recorded pass in which linear maps and norms are single steps, and why some of them cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from shallower.finding.pointwise import ACTIVATIONS, PRODUCTS, UNCHANGED, is_pointwise, pools
from shallower.modules.forwards import foreign
from shallower.modules.layers import is_conv1d
from shallower.recording.holders import held_elsewhere
from shallower.recording.tracing import Call, Frame, Trace, Value
from shallower.sites import LinearMap

PLAIN_WEIGHTS = (nn.Parameter, torch.Tensor, FakeTensor)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LINEARS = (
    "linear x weight bias",
    "linear x weight",
    "get.T weight, matmul x 0",
    "get.T weight, matmul x 0, add 1 bias",
)
NORMALISING = ("batch_norm x running_mean running_var weight bias", "batch_norm x running_mean running_var")
"""What a plain layer calls: each function with what it reads, the results of earlier ones by their number."""


@dataclass(eq=False)
class Unit:
    """A module invocation that is seen as one step.

    Attributes:
        frame: the invocation.
        kind: a linear map, a norm, or something else that makes one tensor of another as a whole (a softmax).
        source: the value it reads.
        result: the value it gives.
        problem: why it cannot be used, "" if it can.
    """

    frame: Frame
    kind: Literal["map", "norm", "whole"]
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
        frames: all invocations of each module.
        units, unit_of: the single steps, by their frame and by each of their calls.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in trace.model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in self.names:
            for attribute, child in parent._modules.items():
                if child is not None:
                    self.holders.setdefault(child, []).append((parent, attribute))
        self._sharing: dict[Value, list[str]] = {}
        for (owner, attribute), value in trace.weights.items():
            self._sharing.setdefault(value, []).append(f"{self.names[owner][0]}.{attribute}")
        self.frames: dict[nn.Module, list[Frame]] = {}
        self.units: dict[Frame, Unit] = {}
        self.unit_of: dict[Call, Unit] = {}
        self._held = held_elsewhere(trace.model)
        self._order = {call: i for i, call in enumerate(trace.calls)}
        for frame in trace.frames:
            self.frames.setdefault(frame.module, []).append(frame)
            if not any(outer in self.units for outer in frame.ancestors()):
                self._gather(frame)

    # ------------------------------------------------------------------------------------------------------- steps

    def position(self, step: Step) -> int:
        """When a step was made, counted in calls; of a unit the first of its calls."""
        return self._order[next(step.frame.calls()) if isinstance(step, Unit) else step]

    def steps(self, calls: Iterable[Call]) -> list[Step]:
        """Calls as steps, those of one unit together."""
        return list(dict.fromkeys(self.unit_of.get(call, call) for call in calls))

    def source(self, value: Value) -> Step | None:
        """The step that made a value."""
        return None if value.call is None else self.unit_of.get(value.call, value.call)

    def is_map(self, step: Step) -> bool:
        """Whether a step is a linear map, usable or not."""
        if isinstance(step, Unit):
            return step.kind == "map"
        return step.name in PRODUCTS and weight_of(step) is not None

    def title(self, step: Step | Frame) -> str:
        """A step, for people."""
        frame = step if isinstance(step, Frame) else step.frame
        kind = type(frame.module).__name__
        if isinstance(step, Call):
            return f"`{step.name}` in {frame.name or kind}"
        return f"{frame.name} ({kind})" if frame.name else kind

    def name(self, step: Step) -> str:
        """The name of the layer that a map is, or whose weight a call is given."""
        if isinstance(step, Unit):
            return step.frame.name or type(step.module).__name__
        weight = weight_of(step)
        return weight.name.rpartition(".")[0] or weight.name if weight is not None else step.name

    def _gather(self, frame: Frame) -> None:
        """Keep what a module did as one step, where it is one."""
        calls = list(frame.calls())
        kind = kind_of(frame.module) or self._whole(frame, calls)
        if not kind:
            return
        made = set(chain.from_iterable(call.outputs for call in calls))
        results = [value for value in frame.outputs if value in made]
        if kind == "norm" and any(call.name in ACTIVATIONS for call in calls):
            calls = self._normalising(frame)
            results = [value for call in calls for value in call.outputs]
        read = _read_elsewhere(frame, calls, made)
        if len(results) != 1 or not read or (kind != "norm" and len(frame.outputs) != 1):
            return
        if kind == "whole" and (len(read) > 1 or read[0].shape != results[0].shape):
            return
        unit = self.units[frame] = Unit(frame, kind, read[0], results[0])
        self.unit_of.update(dict.fromkeys(calls, unit))
        if len(read) > 1:
            unit.problem = f"{self.title(frame)} reads more than one tensor"
        elif kind == "map":
            unit.problem = self._map_problem(frame, read[0])
        elif kind == "norm":
            unit.problem = self._norm_problem(frame)
        else:
            unit.problem = f"{self.title(frame)} reads the hidden tensor as a whole and stands in between"

    def _whole(self, frame: Frame, calls: Sequence[Call]) -> Literal["whole", ""]:
        """Whether a module without linear maps mixes what it reads, or does with it what no call of it tells."""
        if any(kind_of(part) == "map" for part in frame.module.modules()) or any(map(self.is_map, calls)):
            return ""
        told = all(is_pointwise(call) or pools(call) or not call.outputs for call in calls)
        return "" if told or any(call.name in ACTIVATIONS for call in calls) else "whole"

    # ---------------------------------------------------------------------------------------------------- problems

    def hook_problem(self, module: nn.Module) -> str:
        """Why a module cannot be exchanged: hooks, an instance's own forward."""
        return foreign(module, self.names[module][0])

    def _module_problem(self, module: nn.Module) -> str:
        """Why a map or norm cannot be exchanged: as `hook_problem`, and it must have one name only."""
        names = self.names[module]
        if len(self.holders.get(module, ())) > 1:
            return f"{names[0]} is held under several names ({', '.join(names[:3])}); keep one of them"
        if any(name.endswith("_orig_mod") for name in names):
            return f"{names[0]} was compiled alone; put the layer itself there, and compile the result"
        if module in self._held:
            place = self._held[module]
            return f"{names[0]} is also in {place}, through which a forward may call it; keep it as an attribute only"
        return self.hook_problem(module)

    def _map_problem(self, frame: Frame, source: Value) -> str:
        """Why a linear map cannot be used."""
        module, name, kind = frame.module, self.names[frame.module][0], type(frame.module).__name__
        weight = getattr(module, "weight", None)
        own = False
        if is_adapter(module):
            return f"{name} carries a low-rank adapter ({kind}): call merge_and_unload() first"
        plain = isinstance(weight, torch.Tensor) and type(weight) in PLAIN_WEIGHTS and weight.is_floating_point()
        if not plain or (module, "weight") not in self.trace.weights:
            return (
                f"{name} ({kind}) has no plain floating-point weight: it is quantised, made by a hook (weight_norm) "
                "or parametrized (see torch.nn.utils.parametrize.remove_parametrizations); undo that first"
            )
        if isinstance(module, nn.Conv2d):
            own = (type(module).forward, type(module)._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward)
            reach = [(k - 1) * d % 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            if module.padding == "same" and any(reach):
                return f"{name} pads one side more than the other"
        elif isinstance(module, nn.Linear):
            own = (
                type(module).forward is not nn.Linear.forward
                and self._form(frame, frame.calls(), source) not in LINEARS
            )
        elif kind != "Conv1D" or not is_conv1d(module):
            return f"{name} is a {kind}, which is not supported: only nn.Linear, nn.Conv2d and Transformers' Conv1D are"
        if own:
            return f"{name} is a {kind} with a forward of its own"
        return self._module_problem(module) or self._sharing_problem(module)

    def _sharing_problem(self, module: nn.Module) -> str:
        """Who else has or reads the weights of a layer."""
        name = self.names[module][0]
        for attribute, _ in module.named_parameters(recurse=False):
            value = self.trace.weights[module, attribute]
            others = [place for place in self._sharing[value] if place != f"{name}.{attribute}"]
            if others:
                return f"the {attribute} of {name} is tied to {others[0]}"
            for call in value.readers:
                if all(outer.module is not module for outer in call.frame.ancestors()):
                    return f"the {attribute} of {name} is also read by {self.title(call)}"
        return ""

    def _norm_problem(self, frame: Frame) -> str:
        """Why a norm cannot be folded."""
        module, title = frame.module, self.title(frame)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"the norm {title} stands in between"
        plain = type(module).forward is nn.modules.batchnorm._BatchNorm.forward and type(module) in BATCH_NORMS
        if not plain and not self._normalising(frame):
            return f"{title} is not a plain BatchNorm"
        if module.running_mean is None or module.running_var is None:
            return f"{title} has no running statistics, so it depends on the batch"
        if nn.utils.parametrize.is_parametrized(module):
            return f"{title} is parametrized"
        return self._module_problem(module)

    def _normalising(self, frame: Frame) -> list[Call]:
        """The call that normalises in a BatchNorm that goes on with children, an activation for instance (timm's)."""
        module, own = frame.module, [step for step in frame.steps if isinstance(step, Call) and step.outputs]
        first = next((call for call in frame.calls() if call.outputs), None)
        if not isinstance(module, BATCH_NORMS) or own != [first]:
            return []
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, own[0].args, strict=False)) | dict(own[0].kwargs)
        same = given.get("eps") == module.eps and not given.get("training")
        return own if same and self._form(frame, own, own[0].inputs[0]) in NORMALISING else []

    def _form(self, frame: Frame, calls: Iterable[Call], source: Value) -> str:
        """What a module calls, as `LINEARS` has it."""
        known = {source: "x"}
        for table in (self.trace.weights, self.trace.buffers):
            for name in (*frame.module._parameters, *frame.module._buffers):
                if (frame.module, name) in table:
                    known[table[frame.module, name]] = name
        made: list[str] = []
        for call in calls:
            if call.name in UNCHANGED and call.inputs[0] in known:
                known.update(dict.fromkeys(call.outputs, known[call.inputs[0]]))
            elif call.outputs:
                known[call.outputs[0]] = str(len(made))
                name = "get.T" if call.name in ("t", "transpose") else call.name
                made.append(" ".join([name, *(known.get(value, "?") for value in call.inputs)]))
        return ", ".join(made)

    # ------------------------------------------------------------------------------------------------ descriptions

    def linear_map(self, units: Sequence[Unit]) -> LinearMap:
        """The description of a map, from all its calls that count."""
        module = units[0].module
        d_in, d_out = sizes(module)
        name, bias = self.names[module][0], getattr(module, "bias", None) is not None
        positions = sum(unit.result.elements // d_out for unit in units)
        if not isinstance(module, nn.Conv2d):
            kind: Literal["linear", "conv1d"] = "linear" if isinstance(module, nn.Linear) else "conv1d"
            return LinearMap(name, kind, d_in, d_out, bias, positions)
        kernel, dilation, stride = _pair(module.kernel_size), _pair(module.dilation), _pair(module.stride)
        if module.padding == "same":
            padding = ((kernel[0] - 1) * dilation[0] // 2, (kernel[1] - 1) * dilation[1] // 2)
        else:
            padding = (0, 0) if isinstance(module.padding, str) else _pair(module.padding)
        images = {unit.source.shape[-2:] for unit in units}
        size = (0, 0) if len(images) > 1 else _pair(images.pop())
        return LinearMap(
            name, "conv2d", d_in, d_out, bias, positions, kernel, stride, padding, dilation, module.groups, size
        )


def kind_of(module: nn.Module) -> Literal["map", "norm", ""]:
    """Whether a module is to be seen as one linear map, one norm, or through."""
    if is_adapter(module) or is_conv1d(module) or isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
        return "map"
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    if sized and not list(module.children()):
        return "map"
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
        return "norm"
    named = "norm" in type(module).__name__.lower()
    return "norm" if named and not any(map(kind_of, [*module.modules()][1:])) else ""


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear layer that carries a low-rank adapter."""
    own = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
    lora = any(name.lower().startswith("lora") for name in own)
    return lora or isinstance(getattr(module, "base_layer", None), nn.Module)


def weight_of(call: Call) -> Value | None:
    """The parameter of two or more dimensions that a call reads, None where there is none."""
    return next((value for value in call.inputs if value.origin == "parameter" and len(value.shape) > 1), None)


def made_by(step: Step) -> list[Value]:
    """The values that a step gives."""
    return [step.result] if isinstance(step, Unit) else step.outputs


def sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a linear map."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0], weight.shape[1]


def channel_dim(step: Step, dims: int) -> int:
    """Which dimension of a tensor of so many holds the channels that a map makes."""
    return dims - 3 if isinstance(step, Unit) and isinstance(step.module, nn.Conv2d) and dims > 2 else dims - 1


def _read_elsewhere(frame: Frame, calls: Sequence[Call], made: set[Value]) -> list[Value]:
    """What calls read that is none of their results and does not belong to the module."""
    own, found = set(frame.module.modules()), dict[Value, None]()
    for value in chain.from_iterable(call.inputs for call in calls):
        if value not in made and value.origin != "parameter" and value.owner not in own:
            found[value] = None
    return list(found)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size per dimension."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
