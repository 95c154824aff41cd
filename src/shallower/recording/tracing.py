"""One recorded eager forward pass of a model, as a graph of calls.

Every torch function that the forward pass calls becomes a `Call` between `Value`s, and belongs to the `Frame`
(module invocation) whose `forward` made it. No symbolic tracing: what is recorded is what ran.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shallower.core.failures import sentence
from shallower.core.inputs import Inputs, call
from shallower.core.modes import evaluating
from shallower.core.outputs import without_heads
from shallower.core.trees import mapped, tensors
from shallower.errors import ForwardError, SiteError
from shallower.recording.caches import cached, kv_of
from shallower.recording.dataless import placed
from shallower.recording.holders import check_copyable
from shallower.recording.macs import mac_counter
from shallower.recording.names import canonical, is_metadata, writes

Origin = Literal["input", "parameter", "buffer", "unknown", "computed"]


@dataclass(eq=False)
class Value:
    """One version of a tensor; an in-place operation makes a new version.

    Attributes:
        origin: where it comes from; "computed" values have a `call`, "unknown" ones were made out of sight.
        call: the call that made it.
        readers: the calls that read it, each once.
        shape: of the tensor.
        fed: depends on the example inputs, or on an unknown tensor.
        dynamic: is fed, or was computed from a parameter.
        output: the model returns it, or keeps it.
        name: dotted name, of a parameter or buffer; owner: the module that holds it.
        tensor: identity of the tensor, shared by its versions.
        storage: identity of the memory it lies in.
        clobbered: another tensor in the same memory was written in place later.
    """

    origin: Origin
    shape: tuple[int, ...]
    call: Call | None = None
    readers: list[Call] = field(default_factory=list)
    fed: bool = False
    dynamic: bool = False
    output: bool = False
    name: str = ""
    owner: nn.Module | None = None
    tensor: int = 0
    storage: int = 0
    clobbered: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(eq=False)
class Call:
    """One call of a torch function.

    Attributes:
        name: canonical: "relu" for F.relu, torch.relu, Tensor.relu_; "mul" for `x * y`.
        function: what was called.
        args, kwargs: its arguments, each tensor replaced by its `Value`.
        inputs: the values among them, in order.
        outputs: the values it made.
        frame: the module invocation whose own forward made the call.
        ordinal: how many calls of this name the frame's original forward makes before it.
        inplace: it wrote into its first argument.
        macs: multiply-accumulate operations that it took.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    frame: Frame
    ordinal: int
    inplace: bool
    macs: int = 0


@dataclass(eq=False)
class Frame:
    """One invocation of a module.

    Attributes:
        module: what was called.
        name: its dotted name, the first where it has several; None for the caller of the model.
        parent: the frame that called it; None for the model itself.
        ordinal: how many times the parent's original forward calls this module before.
        steps: the calls and module invocations of its own forward, in order.
        args, kwargs: what it was called with, each tensor replaced by its value.
        outputs: tensors it returned.
        returned: the tensor, tuple or list that it returned, each tensor replaced by its value; else None.
    """

    module: nn.Module
    name: str | None
    parent: Frame | None
    ordinal: int = 0
    steps: list[Call | Frame] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    returned: Any = None
    counts: Counter[Any] = field(default_factory=Counter)

    def calls(self) -> Iterator[Call]:
        """All calls made during this invocation, by the module or by modules it calls."""
        for step in self.steps:
            if isinstance(step, Call):
                yield step
            else:
                yield from step.calls()

    def ancestors(self) -> Iterator[Frame]:
        """This frame and those around it, innermost first."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent


@dataclass(eq=False)
class Trace:
    """A recorded forward pass.

    Attributes:
        model: the model.
        root: the outermost frame.
        calls: all calls in order of execution.
        frames: all frames in order of entry.
        weights: the value of each parameter, by the module and the attribute that hold it.
        buffers: likewise of each buffer.
        macs: multiply-accumulate operations of the pass.
        kv: bytes for each token of the KV cache that it returned; None where it returned none.
        cached: the keys and values of that cache, each (batch, heads, tokens, channels).
    """

    model: nn.Module
    root: Frame
    calls: list[Call] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    weights: dict[tuple[nn.Module, str], Value] = field(default_factory=dict)
    buffers: dict[tuple[nn.Module, str], Value] = field(default_factory=dict)
    macs: int = 0
    kv: int | None = None
    cached: list[Value] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[nn.Module, str]:
        """The dotted name of each module, the first of those that it has."""
        return {module: name for name, module in self.model.named_modules()}


Lead = Callable[[Trace, Frame, Any, tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs a function in place of a recorder, given what was recorded until then and the frame that calls it."""

EXTERNALISED = "_shallower_externalised"
"""Where a module remembers which calls of its forward have become children of it (see modules/rewriting.py)."""


def original_ordinal(owner: nn.Module, name: str, count: int) -> int:
    """Which call of this name of a module's original forward the one is that its forward makes after `count` others.

    They differ where calls have become children.
    """
    gone = {
        ordinal
        for calls, change in vars(owner).get(EXTERNALISED, {}).items()
        for called, ordinal in calls
        if called == name and change.hides
    }
    ordinal = count
    for taken in sorted(gone):
        ordinal += taken <= ordinal
    return ordinal


class _Recorder(TorchFunctionMode):
    """Turns torch functions into calls of the current frame."""

    def __init__(self, trace: Trace, lead: Lead | None) -> None:
        super().__init__()
        self.trace = trace
        self.lead = lead
        self.counter = mac_counter()
        self.counted = 0
        self.frame = trace.root
        self.known: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.by_storage: dict[int, list[Value]] = {}
        self.depth = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.depth += 1
        try:
            if self.lead is None:
                result = func(*args, **kwargs)
            else:
                result = self.lead(self.trace, self.frame, func, args, kwargs)
        finally:
            self.depth -= 1
        self.record(func, args, kwargs, result)
        return result

    def adopt_all(self, names: Mapping[nn.Module, str], inputs: Inputs) -> None:
        """Give the parameters and buffers of some modules, and what the model is called with, their values."""
        for module, name in names.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in self.known:
                        self.adopt(parameter, "parameter", f"{name}.{attribute}".lstrip("."))
                    self.trace.weights[module, attribute] = self.value(parameter)
            for attribute, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in self.known:
                    self.adopt(buffer, "buffer", attribute).owner = module
                if buffer is not None:
                    self.trace.buffers[module, attribute] = self.value(buffer)
        for tensor in tensors(inputs):
            self.known.pop(id(tensor), None)
            self.adopt(tensor, "input", fed=True)

    def see_kept(self, modules: Iterable[nn.Module]) -> None:
        """What modules keep in attributes is there after the pass, as what the model returns is."""
        for module in modules:
            for item in vars(module).values():
                if isinstance(item, Tensor) and id(item) in self.known:
                    self.known[id(item)].output = True

    def adopt(self, tensor: Tensor, origin: Origin, name: str = "", fed: bool = False) -> Value:
        """The value of a tensor that no recorded call made."""
        value = Value(
            origin, tuple(tensor.shape), name=name, fed=fed, dynamic=fed, tensor=id(tensor), storage=_storage(tensor)
        )
        self.alive.append(tensor)
        self.known[id(tensor)] = value
        self.by_storage.setdefault(value.storage, []).append(value)
        return value

    def value(self, tensor: Tensor) -> Value:
        """The current version of a tensor."""
        known = self.known.get(id(tensor))
        return known if known is not None else self.adopt(tensor, "unknown", fed=True)

    def record(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Add a call that has just run."""
        name = canonical(function)
        if self.lead is not None:
            if not is_metadata(name) or next(tensors(result), None) is not None:
                self.trace.calls.append(Call(name, function, (), {}, [], [], self.frame, 0, False))
            return
        inplace = writes(function, name, kwargs)
        written = [t for t in tensors(args[:1]) if inplace] + list(tensors(kwargs.get("out")))
        returned = list(tensors(result))
        if not returned and not written and is_metadata(name):
            return
        inputs = list(dict.fromkeys(self.value(tensor) for tensor in tensors((args, kwargs))))
        produced = list({id(t): t for t in [*written, *returned]}.values())
        frame = self.frame
        counted = bool(produced) and bool(inputs)
        total = self.counter.get_total_flops() // 2
        macs, self.counted = total - self.counted, total
        made = Call(
            name=name,
            function=function,
            args=self.described(args),
            kwargs=self.described(dict(kwargs)),
            inputs=inputs,
            outputs=[],
            frame=frame,
            ordinal=original_ordinal(frame.module, name, frame.counts[name]),
            inplace=bool(written),
            macs=macs,
        )
        if counted:
            frame.counts[name] += 1
        for value in inputs:
            value.readers.append(made)
        fed = any(value.fed for value in inputs)
        dynamic = fed or any(value.dynamic or value.origin == "parameter" for value in inputs)
        for tensor in produced:
            before = self.known.get(id(tensor))
            if before is not None and before.origin in ("parameter", "buffer") and not written:
                continue
            value = Value("computed", tuple(tensor.shape), call=made, fed=fed, dynamic=dynamic)
            value.tensor, value.storage = id(tensor), _storage(tensor)
            if before is None:
                self.alive.append(tensor)
            self.known[id(tensor)] = value
            if written and "dropout" not in name:  # which changes nothing in eval mode
                for other in self.by_storage.get(value.storage, ()):
                    other.clobbered |= other.tensor != value.tensor
            self.by_storage.setdefault(value.storage, []).append(value)
            made.outputs.append(value)
        frame.steps.append(made)
        self.trace.calls.append(made)

    def described(self, value: Any) -> Any:
        """`value` with each tensor in it replaced by its current version."""
        return mapped(self.value, value)


class _Unseen(TorchDispatchMode):
    """Reports operators that run outside of any recorded function: scripted code, extensions written in C++."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.recorder.depth == 0:
            self.recorder.record(func, args, kwargs or {}, result)
        return result


class StoppedError(SiteError):
    """A model does not run on the example inputs; `trace` holds the calls that it made until then."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


def trace_forward(model: nn.Module, example_inputs: Inputs, lead: Lead | None = None) -> Trace:
    """Run `model` once on `example_inputs`, in eval mode without gradients, and record it.

    The model's mode, the random state and the inputs are as before afterwards. Inputs go to the device of the
    model's parameters. A model on the meta device runs on fake tensors, so it needs no memory and no data.

    Args:
        model: not changed.
        example_inputs: what it is called with.
        lead: runs the functions instead of their being called, to see or change what they are given and give. Then
            operations are not counted, and of calls and frames only the names are recorded.

    Raises:
        SiteError: `model` is not a module, has no parameters, or does not run on these inputs.
    """
    if not isinstance(model, nn.Module):
        raise SiteError(f"sites are found in a torch.nn.Module, not in a {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise SiteError(f"{type(model).__name__} has no parameters, so there is nothing in it to squeeze")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise SiteError(
            f"{type(model).__name__} has parameters without a shape yet (lazy modules); run it once on real inputs"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise SiteError("a scripted model cannot be looked into; pass the torch.nn.Module it was made from")
    if lead is None:
        check_copyable(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        inputs = stack.enter_context(placed(model, example_inputs))
        names: dict[nn.Module, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, name)
        trace = Trace(model, Frame(nn.Module(), None, None))
        recorder = _Recorder(trace, lead)
        if lead is None:
            recorder.adopt_all(names, inputs)

        # Modules made on the fly, not part of the model, are seen through: their calls are the caller's.
        def enter(module: nn.Module, _: Any) -> None:
            if module not in names:
                return
            parent = recorder.frame
            ordinal = parent.counts[module]
            if EXTERNALISED in vars(parent.module):
                path = next((name for name, part in parent.module.named_modules() if part is module), "")
                ordinal = original_ordinal(parent.module, f"self.{path}", ordinal)
            frame = Frame(module, names.get(module), parent, ordinal=ordinal)
            parent.counts[module] += 1
            parent.steps.append(frame)
            trace.frames.append(frame)
            recorder.frame = frame

        def leave(module: nn.Module, args: Any, *rest: Any) -> None:
            if module not in names:
                return
            # After an error in the forward the hook is called without the keyword arguments.
            kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
            frame = recorder.frame
            while frame.module is not module and frame.parent is not None:
                frame = frame.parent
            if lead is None:
                frame.args, frame.kwargs = recorder.described(args), recorder.described(kwargs)
                frame.outputs = [recorder.value(t) for t in tensors(output)]
                if isinstance(output, (Tensor, tuple, list)):
                    frame.returned = recorder.described(output)
                if frame.parent is trace.root:
                    recorder.see_kept(names)
            if frame.parent is not None:
                recorder.frame = frame.parent

        stack.callback(register_module_forward_pre_hook(enter).remove)
        handle = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        stack.callback(handle.remove)
        # PyTorch forgets this entry when the handle is removed, and torch.compile then warns of global hooks for good.
        stack.callback(global_hooks._global_forward_hooks_with_kwargs.pop, handle.id, None)
        counter = recorder.counter if lead is None else contextlib.nullcontext()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)`")
                with counter, _Unseen(recorder), recorder:
                    output = call(model, inputs)
        except ForwardError as error:
            raise StoppedError(
                f"{type(model).__name__} does not run on the example inputs: {sentence(error.__cause__ or error)}\n"
                "Example inputs are what the model is called with: a tensor, a tuple of its positional arguments or a "
                "dict of its keyword arguments.",
                trace,
            ) from error
        if lead is None:
            for tensor in tensors(without_heads(output)):
                recorder.value(tensor).output = True
            trace.macs = recorder.counter.get_total_flops() // 2
            trace.kv = kv_of(output)
            trace.cached = [recorder.value(tensor) for tensor in cached(output)]
        trace.root = trace.frames[0]
        trace.root.parent = None
    return trace


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, AttributeError):
        return -id(tensor)
